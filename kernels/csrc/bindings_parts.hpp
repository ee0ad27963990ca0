// What bindings.cpp takes from the other bindings_*.cpp.
#pragma once

#include <pybind11/pybind11.h>

namespace tokenrelay {

void bind_packed(pybind11::module_& m);
void bind_projected(pybind11::module_& m);
void bind_program(pybind11::module_& m);
void bind_step(pybind11::module_& m);

}  // namespace tokenrelay
