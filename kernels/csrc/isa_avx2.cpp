// The inner loops for avx2; CMakeLists.txt gives this file its flags.
#define TOKENRELAY_ISA avx2
#include "simd_avx2.hpp"
// Then what is written in its terms.
#include "leaf_table.hpp"

namespace tokenrelay {

const Table& table_avx2() { return avx2::kTable; }

}  // namespace tokenrelay
