#pragma once

#include <pybind11/pybind11.h>

/// The host tier's values: `Copies`, `LateCopy`, `HostCounts`.
void bind_tier(pybind11::module_& m);
