// Integer products for avx2; CMakeLists.txt gives this file its flags.
#define TOKENRELAY_ISA avx2
#include "leaf_integer.hpp"
// Needs `widened` of the one before.
#include "leaf_fit.hpp"

namespace tokenrelay {

const IntegerTable& integer_table_avx2() {
  static constexpr IntegerTable table = {avx2::quantize, avx2::dot, avx2::fit};
  return table;
}

}  // namespace tokenrelay
