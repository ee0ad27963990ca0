// The cost model against devices that obey it, with noise, pauses and a change of speed.
#include <cmath>
#include <random>

#include "check.hpp"
#include "tokenrelay/scheduler/cost_model.hpp"

using namespace tokenrelay::scheduler;

namespace {

/// A device that obeys the model: microseconds per step, prefill row, prefill token, pair, decode row, context token.
struct Device {
  std::array<double, 6> cost{2000, 150, 30, 0.01, 200, 0.2};
  double noise = 0;
  std::mt19937_64 random{1};

  [[nodiscard]] double exact(const StepShape& s) const {
    return cost[0] + cost[1] * s.prefill_rows + cost[2] * s.prefill_tokens + cost[3] * s.prefill_pairs +
           cost[4] * s.decode_rows + cost[5] * s.decode_context;
  }
  double run(const StepShape& s) { return exact(s) * std::exp(noise * std::normal_distribution<double>()(random)); }
};

StepShape decodes(int rows, int context) {
  StepShape shape;
  for (int i = 0; i < rows; ++i) shape.add_decode(context);
  return shape;
}

StepShape mixed(int rows, int context, int start, int length) {
  StepShape shape = decodes(rows, context);
  shape.add_prefill(start, length);
  return shape;
}

/// Steps as a server has them: a few users, prompts now and then.
void serve(CostModel& model, Device& device, int steps) {
  std::mt19937_64 random(7);
  int rows = 1;
  for (int i = 0; i < steps; ++i) {
    if (i % 50 == 0) rows = 1 + static_cast<int>(random() % 24);
    const int context = 200 + static_cast<int>(random() % 4000);
    const bool prefills = random() % 5 == 0;
    const StepShape shape =
        prefills ? mixed(rows, context, static_cast<int>(random() % 4000), 16 + static_cast<int>(random() % 496))
                 : decodes(rows, context);
    model.observe(shape, device.run(shape));
  }
}

double error(const CostModel& model, const Device& device, const StepShape& shape) {
  return std::abs(model.predict_us(shape) / device.exact(shape) - 1);
}

void check_within(const CostModel& model, const Device& device, double bound) {
  for (const StepShape& shape :
       {decodes(1, 500), decodes(8, 2000), decodes(24, 4000), mixed(4, 1000, 0, 64), mixed(16, 3000, 2000, 512)}) {
    if (error(model, device, shape) > bound) {
      check::fail(__FILE__, __LINE__,
                  "predicted " + std::to_string(model.predict_us(shape)) + " us, the device takes " +
                      std::to_string(device.exact(shape)));
    }
  }
}

}  // namespace

TEST(knows_nothing_at_first) {
  const CostModel model;
  CHECK_EQUAL(model.predict_us(decodes(8, 100)), 0.0);
  CHECK_EQUAL(model.prefill_tokens_within(0, 1.0, 512), 512);
}

TEST(one_step_is_predicted_at_once) {
  CostModel model;
  model.observe(decodes(1, 100), 5000);
  CHECK(std::abs(model.predict_us(decodes(1, 100)) - 5000) < 50);
}

TEST(learns_an_exact_device) {
  CostModel model;
  Device device;
  serve(model, device, 2000);
  check_within(model, device, 0.03);
  CHECK(std::abs(model.speed() - 1) < 0.02);
}

/// Few tokens cost what the weights cost to read, many what they cost to compute. Prompts alone hide the former, and a
/// single user cannot tell a step's fixed part from a row's own.
TEST(learns_a_device_that_reads_weights_or_computes) {
  const auto device = [](const StepShape& s) {
    return 300 + std::max(2400.0, 15.0 * (s.prefill_tokens + s.decode_rows)) + 0.0013 * s.prefill_pairs +
           0.017 * s.decode_context;
  };
  CostModel model;
  std::mt19937_64 random(5);
  const auto observe = [&](const StepShape& shape) { model.observe(shape, device(shape)); };
  for (int i = 0; i < 400; ++i) {
    observe(mixed(0, 0, static_cast<int>(random() % 30000), 1000 + static_cast<int>(random() % 7000)));
    for (int k = 0; k < 10; ++k) observe(decodes(1, 10000 + static_cast<int>(random() % 40000)));
    if (i % 4 == 0) observe(mixed(1, 20000, static_cast<int>(random() % 30000), 16 + static_cast<int>(random() % 800)));
  }
  for (const StepShape& shape : {decodes(1, 30000), decodes(4, 30000), decodes(12, 20000), mixed(3, 20000, 5000, 64),
                                 mixed(3, 20000, 5000, 900), mixed(0, 0, 20000, 8192)}) {
    const double ratio = model.predict_us(shape) / device(shape);
    if (ratio < 0.9 || ratio > 1.1) check::fail(__FILE__, __LINE__, "predicted / taken is " + std::to_string(ratio));
  }
}

TEST(learns_through_noise) {
  CostModel model;
  Device device;
  device.noise = 0.2;
  serve(model, device, 4000);
  check_within(model, device, 0.2);
}

TEST(forgives_a_slow_first_step) {
  CostModel model;
  Device device;
  model.observe(mixed(0, 0, 0, 100), 50 * device.exact(mixed(0, 0, 0, 100)));
  serve(model, device, 300);
  check_within(model, device, 0.08);
}

TEST(a_paused_process_moves_little) {
  CostModel model;
  Device device;
  serve(model, device, 1000);
  const double before = model.predict_us(decodes(8, 1000));
  model.observe(decodes(8, 1000), 10e6);
  CHECK(model.predict_us(decodes(8, 1000)) < 1.2 * before);
  serve(model, device, 50);
  check_within(model, device, 0.05);
}

TEST(a_step_that_looks_too_fast_moves_little) {
  CostModel model;
  Device device;
  serve(model, device, 1000);
  const double before = model.predict_us(decodes(8, 1000));
  model.observe(decodes(8, 1000), 3);
  CHECK(model.predict_us(decodes(8, 1000)) > 0.6 * before);
  serve(model, device, 100);
  check_within(model, device, 0.1);
}

TEST(follows_a_device_that_slows_down) {
  CostModel model;
  Device device;
  serve(model, device, 2000);
  for (double& cost : device.cost) cost *= 2;
  serve(model, device, 40);
  check_within(model, device, 0.2);
}

TEST(long_decoding_does_not_forget_prompts_nor_batch_1) {
  CostModel model;
  Device device;
  device.noise = 0.1;
  serve(model, device, 2000);
  for (int i = 0; i < 10000; ++i) {
    const StepShape shape = decodes(12, 1000 + i % 3000);
    model.observe(shape, device.run(shape));
  }
  check_within(model, device, 0.25);
}

TEST(coefficients_are_never_negative) {
  CostModel model;
  std::mt19937_64 random(3);
  for (int i = 0; i < 3000; ++i) {
    const StepShape shape = mixed(static_cast<int>(random() % 9), static_cast<int>(random() % 50),
                                  static_cast<int>(random() % 90), 1 + static_cast<int>(random() % 70));
    model.observe(shape, static_cast<double>(random() % 20000));
    for (const double value : model.coefficients()) CHECK(value >= 0 && std::isfinite(value));
  }
}

TEST(the_inverse_agrees_with_the_prediction) {
  CostModel model;
  Device device;
  serve(model, device, 2000);
  for (const int start : {0, 1000, 30000}) {
    for (const double us : {100.0, 1000.0, 5000.0, 20000.0}) {
      for (const int beside : {0, 100, 1000}) {
        const int tokens = model.prefill_tokens_within(start, us, 4096, beside);
        CHECK(tokens == 0 || model.prefill_us(start, tokens, beside) <= us * 1.0001);
        CHECK(tokens == 4096 || model.prefill_us(start, tokens + 1, beside) > us * 0.9999);
      }
    }
  }
}

TEST(the_same_observations_give_the_same_model) {
  CostModel a;
  CostModel b;
  Device device;
  device.noise = 0.3;
  Device again = device;
  serve(a, device, 500);
  serve(b, again, 500);
  CHECK(a.coefficients() == b.coefficients());
}

CHECK_MAIN
