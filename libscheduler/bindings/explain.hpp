// What a person is told about a sequence, for Python.
#pragma once

#include <pybind11/pybind11.h>

#include "tokenrelay/scheduler/scheduler.hpp"

/// A dictionary with a key for each field of `Explanation`, and `text`; None for an id that is not live.
pybind11::object explanation(const tokenrelay::scheduler::Scheduler& scheduler, std::uint64_t sequence_id);
