// libFuzzer's entry point, and what its inputs led to.
#pragma once

#include "events.hpp"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size);

namespace fuzz {

Seen& seen();

}  // namespace fuzz
