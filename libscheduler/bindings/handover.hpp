#pragma once

#include <pybind11/pybind11.h>

/// The enums of KV that passes between workers.
void bind_handover(pybind11::module_& m);
