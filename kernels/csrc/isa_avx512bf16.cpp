// The inner loops for avx512bf16; CMakeLists.txt gives this file its flags.
#define TOKENRELAY_ISA avx512bf16
#define TOKENRELAY_PAIRS
#include "simd_avx512.hpp"
// Then what is written in its terms.
#include "leaf_table.hpp"

namespace tokenrelay {

const Table& table_avx512bf16() { return avx512bf16::kTable; }

}  // namespace tokenrelay
