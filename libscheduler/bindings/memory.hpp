// The memory's part of the binding: what is known of the reuse of blocks, and what a block costs beside its KV.
#pragma once

#include <pybind11/pybind11.h>

#include <vector>

#include "tokenrelay/scheduler/scheduler.hpp"

void bind_memory(pybind11::module_& module);

/// One kind of block, as the reuse model sees it.
struct ReuseRow {
  std::string origin;
  int level;
  double reused;
  double gone;
  std::int64_t watched;
};
std::vector<ReuseRow> reuse_rows(const tokenrelay::scheduler::Scheduler& scheduler);
