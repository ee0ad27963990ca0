// The table of one instruction set. Included last by isa_*.cpp.
#pragma once

#include "leaf_attention.hpp"
#include "leaf_elementwise.hpp"
#include "leaf_sampling.hpp"

namespace tokenrelay::TOKENRELAY_ISA {
namespace {

constexpr Table kTable = {
    q_type, convert,  attend_needs, attend,    weigh_rows, merge,         divide,  dot,       silu_mul,
    axpy,   rms_norm, rotary,       max_logit, peak,       token_weights, sum_exp, exp_array, sigmoid_array,
};

}  // namespace
}  // namespace tokenrelay::TOKENRELAY_ISA
