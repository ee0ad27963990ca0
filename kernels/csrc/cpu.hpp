// What the processor can do and how many threads this process may run.
#pragma once

#include <string>
#include <vector>

namespace tokenrelay {

// The variants that kernels are compiled in, worst first. Each needs everything the ones before it need.
enum class Isa : int { baseline = 0, avx2 = 1, avx512 = 2, avx512bf16 = 3 };

// Linux's names of the instruction sets that both the processor and the operating system offer.
std::vector<std::string> isa_features();

// Whether this machine can run the variant, and this build contains it.
bool isa_runs(Isa isa);

// Processors this process may use: the scheduling affinity, cut by the cgroup's quota (rounded up); at least 1.
int processors();

}  // namespace tokenrelay
