// Integer products for baseline; CMakeLists.txt gives this file its flags.
#define TOKENRELAY_ISA baseline
#include "leaf_integer.hpp"
// Needs `widened` of the one before.
#include "leaf_fit.hpp"

namespace tokenrelay {

const IntegerTable& integer_table_baseline() {
  static constexpr IntegerTable table = {baseline::quantize, baseline::dot, baseline::fit};
  return table;
}

}  // namespace tokenrelay
