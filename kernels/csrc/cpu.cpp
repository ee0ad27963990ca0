#include "cpu.hpp"

#include <sched.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <fstream>
#include <sstream>

#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>
#endif

namespace tokenrelay {
namespace {

#if defined(__x86_64__)
struct Registers {
  unsigned a = 0, b = 0, c = 0, d = 0;
};

Registers cpuid(unsigned leaf, unsigned subleaf) {
  Registers r;
  if (!__get_cpuid_count(leaf, subleaf, &r.a, &r.b, &r.c, &r.d)) return {};
  return r;
}

// Which register files the operating system saves (XCR0); without AVX state the wide instructions trap.
uint64_t saved_state() {
  unsigned low = 0, high = 0;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (static_cast<uint64_t>(high) << 32) | low;
}

std::vector<std::string> probe() {
  const Registers one = cpuid(1, 0);
  const auto bit = [](unsigned value, int index) { return ((value >> index) & 1u) != 0; };
  if (!bit(one.c, 27)) return {};  // no XSAVE: nothing beyond SSE
  const uint64_t state = saved_state();
  const bool avx = (state & 0x6) == 0x6, avx512 = (state & 0xe6) == 0xe6, amx = (state & 0x60000) == 0x60000;
  const Registers seven = cpuid(7, 0), more = cpuid(7, 1);
  std::vector<std::string> found;
  const auto add = [&](bool present, const char* name) {
    if (present) found.emplace_back(name);
  };
  add(avx && bit(seven.b, 5), "avx2");
  add(avx && bit(one.c, 12), "fma");
  add(avx && bit(one.c, 29), "f16c");
  add(avx512 && bit(seven.b, 16), "avx512f");
  add(avx512 && bit(seven.b, 30), "avx512bw");
  add(avx512 && bit(seven.b, 31), "avx512vl");
  add(avx512 && bit(seven.b, 17), "avx512dq");
  add(avx512 && bit(more.a, 5), "avx512_bf16");
  add(avx512 && bit(seven.c, 11), "avx512_vnni");
  add(amx && bit(seven.d, 22), "amx_bf16");
  return found;
}
#else
std::vector<std::string> probe() { return {}; }
#endif

std::string first_line(const char* path) {
  std::ifstream file(path);
  std::string line;
  std::getline(file, line);
  return line;
}

// Processors the cgroup's quota is worth, or infinity.
double quota() {
  std::istringstream unified(first_line("/sys/fs/cgroup/cpu.max"));  // "max 100000" or "150000 100000"
  double used = 0, period = 0;
  if (unified >> used >> period && period > 0) return used / period;
  std::istringstream first(first_line("/sys/fs/cgroup/cpu/cpu.cfs_quota_us"));
  std::istringstream second(first_line("/sys/fs/cgroup/cpu/cpu.cfs_period_us"));
  if (first >> used && second >> period && used > 0 && period > 0) return used / period;
  return INFINITY;
}

}  // namespace

std::vector<std::string> isa_features() {
  static const std::vector<std::string> found = probe();
  return found;
}

namespace {

bool look_up(Isa isa) {
  const auto has = [](std::initializer_list<const char*> names) {
    const auto found = isa_features();
    return std::all_of(names.begin(), names.end(),
                       [&](const char* name) { return std::find(found.begin(), found.end(), name) != found.end(); });
  };
  switch (isa) {
    case Isa::baseline:
      return true;
#if defined(__x86_64__)
    case Isa::avx2:
      return has({"avx2", "fma", "f16c"});
    case Isa::avx512:
      return has({"avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512vl", "avx512dq"});
    case Isa::avx512bf16:
      return has({"avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_bf16"});
#endif
    default:
      return has({"none"});
  }
}

}  // namespace

bool isa_runs(Isa isa) {
  static const bool found[] = {look_up(Isa::baseline), look_up(Isa::avx2), look_up(Isa::avx512),
                               look_up(Isa::avx512bf16)};  // asked for by every call of a kernel
  return found[static_cast<size_t>(isa)];
}

int processors() {
  cpu_set_t set;
  CPU_ZERO(&set);
  const int affinity = sched_getaffinity(0, sizeof set, &set) == 0 ? CPU_COUNT(&set) : 1;
  const double limit = std::ceil(quota());
  return std::max(1, limit < affinity ? static_cast<int>(limit) : affinity);
}

}  // namespace tokenrelay
