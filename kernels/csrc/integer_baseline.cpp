// Integer products for baseline; CMakeLists.txt gives this file its flags.
#define TOKENRELAY_ISA baseline
#include "leaf_integer.hpp"

namespace tokenrelay {

const IntegerTable& integer_table_baseline() {
  static constexpr IntegerTable table = {baseline::quantize, baseline::dot};
  return table;
}

}  // namespace tokenrelay
