// The inner loops for baseline; CMakeLists.txt gives this file its flags.
#define TOKENRELAY_ISA baseline
#include "simd_baseline.hpp"
// Then what is written in its terms.
#include "leaf_table.hpp"

namespace tokenrelay {

const Table& table_baseline() { return baseline::kTable; }

}  // namespace tokenrelay
