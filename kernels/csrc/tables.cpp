#include <stdexcept>
#include <string>

#include "table.hpp"

namespace tokenrelay {

const Table& table_of(int isa) {
  if (isa < 0 || isa > static_cast<int>(Isa::avx512bf16) || !isa_runs(static_cast<Isa>(isa))) {
    throw std::invalid_argument("this machine or build cannot run instruction set variant " + std::to_string(isa));
  }
  switch (static_cast<Isa>(isa)) {
#if defined(__x86_64__)
    case Isa::avx2:
      return table_avx2();
    case Isa::avx512:
      return table_avx512();
    case Isa::avx512bf16:
      return table_avx512bf16();
#endif
    default:
      return table_baseline();
  }
}

}  // namespace tokenrelay
