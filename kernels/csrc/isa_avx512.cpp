// The inner loops for avx512; CMakeLists.txt gives this file its flags.
#define TOKENRELAY_ISA avx512
#include "simd_avx512.hpp"
// Then what is written in its terms.
#include "leaf_table.hpp"

namespace tokenrelay {

const Table& table_avx512() { return avx512::kTable; }

}  // namespace tokenrelay
