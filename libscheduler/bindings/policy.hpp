// The policy's part of the binding: the cost model, the floor's counters, the reasons of decisions.
#pragma once

#include <pybind11/pybind11.h>

void bind_policy(pybind11::module_& module);
