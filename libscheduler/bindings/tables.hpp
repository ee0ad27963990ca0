// The constexpr tables for Python: `fsm_tables()`.
#pragma once

#include <pybind11/pybind11.h>

void bind_tables(pybind11::module_& m);
