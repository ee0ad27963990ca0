// The target for libFuzzer (https://llvm.org/docs/LibFuzzer.html), and for fuzz/replay.cpp where there is no clang.
#include "target.hpp"

#include <cstdlib>

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  if (!fuzz::Player(fuzz::Input({data, size}), fuzz::seen(), nullptr).play(fuzz::events_max)) std::abort();
  return 0;
}

namespace fuzz {

Seen& seen() {
  static Seen all;
  return all;
}

}  // namespace fuzz
