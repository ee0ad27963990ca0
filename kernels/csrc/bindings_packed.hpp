// What bindings.cpp takes from bindings_packed.cpp.
#pragma once

#include <pybind11/pybind11.h>

namespace tokenrelay {

void bind_packed(pybind11::module_& m);

}  // namespace tokenrelay
