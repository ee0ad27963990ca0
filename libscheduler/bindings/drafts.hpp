#pragma once

#include <pybind11/pybind11.h>

/// Drafts: what the scheduler answers and counts, and the index that finds them in a sequence's own text.
void bind_drafts(pybind11::module_& m);
