// The Python binding, `tokenrelay.libscheduler._native`. Arrays are views without a copy: of a plan or an outcome they
// live as long as the object, of the block table as long as the scheduler.
//
// Only long work releases the GIL: hashing a long prompt, the integrity check. A plan or a commit takes microseconds,
// and to get the GIL back from a busy thread may take its whole switch interval (5 ms).
#include <pybind11/native_enum.h>
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <memory>

#include "drafts.hpp"
#include "explain.hpp"
#include "handover.hpp"
#include "memory.hpp"
#include "policy.hpp"
#include "tables.hpp"
#include "tier.hpp"
#include "tokenrelay/scheduler/scheduler.hpp"

namespace py = pybind11;
namespace ts = tokenrelay::scheduler;

namespace {

constexpr std::size_t gil_tokens = 4096;  // prompts longer than this are hashed without the GIL

/// A contiguous buffer of uint32 (or of packed little-endian bytes), held for the length of a call.
class TokenBuffer {
 public:
  explicit TokenBuffer(const py::handle& object) {
    if (PyObject_GetBuffer(object.ptr(), &view_, PyBUF_FORMAT | PyBUF_C_CONTIGUOUS) != 0) throw py::error_already_set();
    const char* format = view_.format == nullptr ? "B" : view_.format;
    if (*format == '<' || *format == '=' || *format == '@') ++format;
    const bool words = view_.itemsize == 4 && (*format == 'I' || *format == 'L' || *format == 'i' || *format == 'l');
    const bool bytes = view_.itemsize == 1 && view_.len % 4 == 0;
    if (!words && !bytes) {
      PyBuffer_Release(&view_);
      throw py::type_error("token_ids must be a contiguous buffer of uint32 (or of packed little-endian bytes)");
    }
    if (reinterpret_cast<std::uintptr_t>(view_.buf) % alignof(ts::TokenId) != 0) {
      copy_.resize(static_cast<std::size_t>(view_.len) / 4);
      std::memcpy(copy_.data(), view_.buf, copy_.size() * 4);
    }
  }
  TokenBuffer(const TokenBuffer&) = delete;
  TokenBuffer& operator=(const TokenBuffer&) = delete;
  ~TokenBuffer() { PyBuffer_Release(&view_); }
  [[nodiscard]] std::span<const ts::TokenId> tokens() const noexcept {
    if (!copy_.empty()) return copy_;
    return {static_cast<const ts::TokenId*>(view_.buf), static_cast<std::size_t>(view_.len) / 4};
  }

 private:
  Py_buffer view_{};
  std::vector<ts::TokenId> copy_;
};

std::span<const std::uint8_t> bytes_of(const py::bytes& bytes) {
  const std::string_view view = bytes;
  return {reinterpret_cast<const std::uint8_t*>(view.data()), view.size()};
}

std::array<std::uint8_t, 16> key_of(const py::bytes& bytes, const char* name) {
  const auto view = bytes_of(bytes);
  if (view.size() != 16) {
    throw py::value_error(std::string(name) + " has " + std::to_string(view.size()) + " bytes, expected 16");
  }
  std::array<std::uint8_t, 16> out{};
  std::copy(view.begin(), view.end(), out.begin());
  return out;
}

py::bytes python_bytes(const ts::Hash128& hash) {
  const auto bytes = ts::to_bytes(hash);
  return {reinterpret_cast<const char*>(bytes.data()), bytes.size()};
}

/// A read-only array that shares the memory of `owner`'s vector.
template <class T>
py::array view(const std::vector<T>& values, const py::handle& owner) {
  py::array array(py::dtype::of<T>(), {static_cast<py::ssize_t>(values.size())}, {sizeof(T)}, values.data(), owner);
  py::detail::array_proxy(array.ptr())->flags &= ~py::detail::npy_api::NPY_ARRAY_WRITEABLE_;
  return array;
}

template <class Class, class Struct, class T>
void def_view(Class& type, const char* name, std::vector<T> Struct::* member) {
  type.def_property_readonly(name,
                             [member](const py::object& self) { return view(self.cast<Struct&>().*member, self); });
}

/// Hands out structures that are reused once Python has dropped them, so that a steady state allocates nothing.
template <class T>
class Recycled {
 public:
  std::shared_ptr<T> get(const ts::Config& config) {
    for (auto& item : items_) {
      if (item.use_count() == 1) return item;
    }
    auto item = std::make_shared<T>();
    item->reserve(config);
    if (items_.size() < items_max) items_.push_back(item);
    return item;
  }

 private:
  static constexpr std::size_t items_max = 8;
  std::vector<std::shared_ptr<T>> items_;
};

class PyScheduler {
 public:
  PyScheduler(const ts::Config& config, const py::object& generations) : scheduler(config) {
    if (generations.is_none()) return;
    auto words = py::array_t<std::uint64_t, py::array::c_style>::ensure(generations);
    if (!words || words.ptr() != generations.ptr() || !words.writeable() || words.size() != config.blocks) {
      throw py::value_error("generations must be a writable, contiguous uint64 array with a word for each of the " +
                            std::to_string(config.blocks) + " blocks");
    }
    scheduler.count_generations_in({words.mutable_data(), static_cast<std::size_t>(words.size())});
    generations_ = std::move(words);  // as long as the scheduler
  }

  std::optional<ts::RejectReason> submit(std::uint64_t id, const py::object& token_ids, std::int64_t output_start,
                                         std::int64_t tokens_max, const std::vector<ts::TokenId>& stop_token_ids,
                                         std::int64_t priority, const py::bytes& salt, const py::bytes& tenant,
                                         std::optional<std::uint64_t> parent, std::optional<std::int64_t> parent_tokens,
                                         ts::Handover handover, bool tools, std::int64_t expected_tokens,
                                         std::int64_t tps_floor, std::int64_t now_us) {
    const TokenBuffer buffer(token_ids);
    ts::Submission submission;
    submission.handover = handover;
    submission.sequence_id = id;
    submission.token_ids = buffer.tokens();
    submission.output_start = static_cast<int>(std::clamp<std::int64_t>(output_start, -1, 1 << 30));
    submission.tokens_max = std::clamp<std::int64_t>(tokens_max, -1, 1 << 30);
    submission.stop_token_ids = stop_token_ids;
    submission.priority = static_cast<int>(std::clamp<std::int64_t>(priority, -1000, 1000));
    submission.salt = bytes_of(salt);
    submission.parent = parent;
    submission.tools = tools;
    submission.expected_tokens = expected_tokens;
    submission.tps_floor = tps_floor;
    // A number below 0 must not read as all of them.
    if (parent_tokens) submission.parent_tokens = std::clamp<std::int64_t>(*parent_tokens, -2, 1 << 30);
    if (submission.parent_tokens == ts::Submission::all_tokens && parent_tokens) --submission.parent_tokens;
    submission.tenant = bytes_of(tenant);
    if (submission.token_ids.size() <= gil_tokens) return scheduler.submit(submission, now_us);
    const py::gil_scoped_release released;
    return scheduler.submit(submission, now_us);
  }

  std::shared_ptr<ts::Plan> plan(std::int64_t now_us) {
    auto plan = plans_.get(scheduler.config());
    return scheduler.plan(now_us, *plan) ? plan : nullptr;
  }

  std::shared_ptr<ts::Outcome> commit(std::uint64_t step, const py::object& token_ids, std::int64_t now_us,
                                      std::optional<std::int64_t> run_us) {
    const TokenBuffer buffer(token_ids);
    const auto expected = scheduler.expected();
    if (!expected) throw py::value_error("no step is launched");
    if (expected->step != step) {
      throw py::value_error("step " + std::to_string(step) + " was committed, expected " +
                            std::to_string(expected->step));
    }
    if (expected->tokens != buffer.tokens().size()) {
      throw py::value_error("step " + std::to_string(step) + " sampled " + std::to_string(expected->tokens) +
                            " tokens, got " + std::to_string(buffer.tokens().size()));
    }
    auto outcome = outcomes_.get(scheduler.config());
    const std::int64_t measured_us = run_us ? std::max<std::int64_t>(*run_us, 0) : ts::Scheduler::by_clock;
    scheduler.commit(step, buffer.tokens(), now_us, *outcome, measured_us);
    return outcome;
  }

  ts::DraftAnswer draft(std::uint64_t id, const py::object& token_ids) {
    const TokenBuffer buffer(token_ids);
    return scheduler.draft(id, buffer.tokens());
  }

  /// Nothing when there is nothing to copy.
  std::shared_ptr<ts::Copies> take_copies() {
    auto copies = std::make_shared<ts::Copies>();
    scheduler.take_copies(*copies);
    return copies->empty() ? nullptr : copies;
  }

  template <bool well>
  std::size_t copies_ended(const std::vector<std::uint64_t>& ids) {
    return well ? scheduler.copied(ids) : scheduler.copy_failed(ids);
  }

  void check() const {
    std::optional<std::string> broken;
    {
      const py::gil_scoped_release released;
      broken = scheduler.check();
    }
    if (broken) {
      PyErr_SetString(PyExc_AssertionError, broken->c_str());
      throw py::error_already_set();
    }
  }

  ts::Scheduler scheduler;

 private:
  Recycled<ts::Plan> plans_;
  Recycled<ts::Outcome> outcomes_;
  py::object generations_;
};

ts::Config make_config(int block_tokens, int blocks, int slots, int context_tokens, int step_tokens, int chunk_tokens,
                       int waiting_max, const py::bytes& hash_key, const py::bytes& model_identity, int steps_in_flight,
                       int overtakes_max, int class_overtakes_max, int preemptions_max, double tps_floor,
                       double tps_fraction, double prefill_share, std::int64_t floor_wait_us,
                       const std::string& eviction, int host_blocks, int write_backs_max, std::int64_t copy_deadline_us,
                       int draft_tokens, int parts, int tail_tokens_min) {
  ts::Config config;
  config.block_tokens = block_tokens;
  config.blocks = blocks;
  config.slots = slots;
  config.context_tokens = context_tokens;
  config.step_tokens = step_tokens;
  config.chunk_tokens = chunk_tokens;
  config.waiting_max = waiting_max;
  config.hash_key = key_of(hash_key, "hash_key");
  config.model_identity = key_of(model_identity, "model_identity");
  config.steps_in_flight = steps_in_flight;
  config.overtakes_max = overtakes_max;
  config.class_overtakes_max = class_overtakes_max;
  config.preemptions_max = preemptions_max;
  config.tps_floor = tps_floor;
  config.tps_fraction = tps_fraction;
  config.prefill_share = prefill_share;
  config.floor_wait_us = floor_wait_us;
  if (eviction != "lru" && eviction != "reuse") {
    throw py::value_error("eviction is \"" + eviction + "\", expected \"lru\" or \"reuse\"");
  }
  config.eviction = eviction == "lru" ? ts::Eviction::lru : ts::Eviction::reuse;
  config.host_blocks = host_blocks;
  config.write_backs_max = write_backs_max;
  config.copy_deadline_us = copy_deadline_us;
  config.draft_tokens = draft_tokens;
  config.parts = parts;
  config.tail_tokens_min = tail_tokens_min;
  if (auto wrong = config.check()) throw py::value_error(*wrong);
  return config;
}

std::vector<py::bytes> block_hashes(const py::object& token_ids, int block_tokens, const py::bytes& hash_key,
                                    const py::bytes& model_identity, const py::bytes& salt) {
  if (block_tokens != 16 && block_tokens != 32 && block_tokens != 64 && block_tokens != 128) {
    throw py::value_error("block_tokens is " + std::to_string(block_tokens) + ", expected 16, 32, 64 or 128");
  }
  const TokenBuffer buffer(token_ids);
  const auto key = ts::key_from_bytes(key_of(hash_key, "hash_key"));
  const auto identity = key_of(model_identity, "model_identity");
  const auto salt_bytes = bytes_of(salt);
  std::vector<ts::Hash128> hashes;
  {
    const py::gil_scoped_release released;
    hashes = ts::block_hashes(key, ts::root_hash(key, identity, salt_bytes), buffer.tokens(), block_tokens);
  }
  std::vector<py::bytes> out;
  out.reserve(hashes.size());
  for (const auto& hash : hashes) out.push_back(python_bytes(hash));
  return out;
}

std::vector<std::pair<std::string, py::bytes>> cache_events(PyScheduler& self) {
  static constexpr const char* kinds[] = {"sealed", "evicted", "lost"};
  std::vector<std::pair<std::string, py::bytes>> out;
  for (const auto& event : self.scheduler.take_cache_events()) {
    out.emplace_back(kinds[static_cast<int>(event.kind)], python_bytes(event.hash));
  }
  return out;
}

py::array block_table(const py::object& self) {
  const auto& scheduler = self.cast<PyScheduler&>().scheduler;
  const auto slots = static_cast<py::ssize_t>(scheduler.config().slots);
  const auto width = static_cast<py::ssize_t>(scheduler.table_width());
  py::array array(py::dtype::of<std::int32_t>(), {slots, width}, {width * 4, py::ssize_t{4}}, scheduler.block_table(),
                  self);
  py::detail::array_proxy(array.ptr())->flags &= ~py::detail::npy_api::NPY_ARRAY_WRITEABLE_;
  return array;
}

py::object sequence_tokens(PyScheduler& self, std::uint64_t id) {
  const auto tokens = self.scheduler.token_ids(id);
  if (!tokens) return py::none();
  return py::array_t<ts::TokenId>(static_cast<py::ssize_t>(tokens->size()), tokens->data());
}

py::array_t<ts::BlockId> blocks_of(const std::vector<ts::BlockId>& ids) {
  return py::array_t<ts::BlockId>(static_cast<py::ssize_t>(ids.size()), ids.data());
}

py::array generations_of(const py::object& self) {
  const auto words = self.cast<PyScheduler&>().scheduler.generations();
  py::array array(py::dtype::of<std::uint64_t>(), {static_cast<py::ssize_t>(words.size())}, {sizeof(std::uint64_t)},
                  words.data(), self);
  py::detail::array_proxy(array.ptr())->flags &= ~py::detail::npy_api::NPY_ARRAY_WRITEABLE_;
  return array;
}

std::vector<std::pair<std::uint64_t, std::int32_t>> take_reserved(PyScheduler& self) {
  std::vector<std::pair<std::uint64_t, std::int32_t>> out;
  for (const auto& reserved : self.scheduler.take_reserved()) {
    out.emplace_back(reserved.sequence_id, reserved.cached_tokens);
  }
  return out;
}

void bind_values(py::module_& m) {
  py::native_enum<ts::RejectReason>(m, "RejectReason", "enum.IntEnum",
                                    "Why a submission was refused; the wire's values.")
      .value("QUEUE_FULL", ts::RejectReason::queue_full)
      .value("PROMPT_TOO_LONG", ts::RejectReason::prompt_too_long)
      .value("DUPLICATE_ID", ts::RejectReason::duplicate_id)
      .value("INVALID", ts::RejectReason::invalid)
      .value("PARENT_UNKNOWN", ts::RejectReason::parent_unknown)
      .finalize();
  py::native_enum<ts::AbortAnswer>(m, "AbortAnswer", "enum.IntEnum", "What an abort found.")
      .value("ABORTED", ts::AbortAnswer::aborted)
      .value("UNKNOWN", ts::AbortAnswer::unknown)
      .value("ALREADY_ENDED", ts::AbortAnswer::already_ended)
      .finalize();
  py::native_enum<ts::Finish>(m, "Finish", "enum.IntEnum", "How a sequence ended, in `Outcome.finish`.")
      .value("NONE", ts::Finish::none)
      .value("STOP", ts::Finish::stop)
      .value("LENGTH", ts::Finish::length)
      .value("HANDOVER", ts::Finish::handover)
      .finalize();
}

void bind_steps(py::module_& m) {
  py::class_<ts::Plan, std::shared_ptr<ts::Plan>> plan(m, "Plan");
  plan.def_readonly("step", &ts::Plan::step)
      .def_readonly("decodes", &ts::Plan::decodes)
      .def_readonly("sampled", &ts::Plan::sampled)
      .def_readonly("drafted", &ts::Plan::drafted)
      .def_readonly("predicted_us", &ts::Plan::predicted_us);
  def_view(plan, "sequence_ids", &ts::Plan::sequence_ids);
  def_view(plan, "slots", &ts::Plan::slots);
  def_view(plan, "starts", &ts::Plan::starts);
  def_view(plan, "lengths", &ts::Plan::lengths);
  def_view(plan, "token_ids", &ts::Plan::token_ids);
  def_view(plan, "feedback", &ts::Plan::feedback);
  def_view(plan, "samples", &ts::Plan::samples);
  def_view(plan, "admitted_ids", &ts::Plan::admitted_ids);
  def_view(plan, "admitted_slots", &ts::Plan::admitted_slots);
  def_view(plan, "admitted_cached", &ts::Plan::admitted_cached);
  def_view(plan, "admitted_output_start", &ts::Plan::admitted_output_start);
  def_view(plan, "tail_sources", &ts::Plan::tail_sources);
  def_view(plan, "tail_blocks", &ts::Plan::tail_blocks);
  def_view(plan, "tail_tokens", &ts::Plan::tail_tokens);

  py::class_<ts::Outcome, std::shared_ptr<ts::Outcome>> outcome(m, "Outcome");
  def_view(outcome, "sequence_ids", &ts::Outcome::sequence_ids);
  def_view(outcome, "token_ids", &ts::Outcome::token_ids);
  def_view(outcome, "finish", &ts::Outcome::finish);
  def_view(outcome, "rows", &ts::Outcome::rows);
  def_view(outcome, "first", &ts::Outcome::first);
  def_view(outcome, "cached_tokens", &ts::Outcome::cached_tokens);
}

void bind_scheduler(py::module_& m) {
  py::class_<ts::Config>(m, "Config")
      .def(py::init(&make_config), py::kw_only(), py::arg("block_tokens") = 64, py::arg("blocks"), py::arg("slots"),
           py::arg("context_tokens"), py::arg("step_tokens") = 2048, py::arg("chunk_tokens") = 512,
           py::arg("waiting_max") = 1024, py::arg("hash_key"), py::arg("model_identity"),
           py::arg("steps_in_flight") = 2, py::arg("overtakes_max") = 16, py::arg("class_overtakes_max") = 256,
           py::arg("preemptions_max") = 3, py::arg("tps_floor") = 0.0, py::arg("tps_fraction") = 0.5,
           py::arg("prefill_share") = 0.125, py::arg("floor_wait_us") = 10'000'000, py::arg("eviction") = "reuse",
           py::arg("host_blocks") = 0, py::arg("write_backs_max") = 64, py::arg("copy_deadline_us") = 10'000'000,
           py::arg("draft_tokens") = 0, py::arg("parts") = 1, py::arg("tail_tokens_min") = 0)
      .def_property_readonly(
          "eviction", [](const ts::Config& self) { return self.eviction == ts::Eviction::lru ? "lru" : "reuse"; })
      .def_readonly("block_tokens", &ts::Config::block_tokens)
      .def_readonly("blocks", &ts::Config::blocks)
      .def_readonly("slots", &ts::Config::slots)
      .def_readonly("context_tokens", &ts::Config::context_tokens)
      .def_readonly("step_tokens", &ts::Config::step_tokens)
      .def_readonly("chunk_tokens", &ts::Config::chunk_tokens)
      .def_readonly("waiting_max", &ts::Config::waiting_max)
      .def_readonly("steps_in_flight", &ts::Config::steps_in_flight)
      .def_readonly("overtakes_max", &ts::Config::overtakes_max)
      .def_readonly("class_overtakes_max", &ts::Config::class_overtakes_max)
      .def_readonly("preemptions_max", &ts::Config::preemptions_max)
      .def_readonly("tps_floor", &ts::Config::tps_floor)
      .def_readonly("tps_fraction", &ts::Config::tps_fraction)
      .def_readonly("prefill_share", &ts::Config::prefill_share)
      .def_readonly("floor_wait_us", &ts::Config::floor_wait_us)
      .def_readonly("host_blocks", &ts::Config::host_blocks)
      .def_readonly("write_backs_max", &ts::Config::write_backs_max)
      .def_readonly("copy_deadline_us", &ts::Config::copy_deadline_us)
      .def_readonly("draft_tokens", &ts::Config::draft_tokens)
      .def_readonly("parts", &ts::Config::parts)
      .def_readonly("tail_tokens_min", &ts::Config::tail_tokens_min);

  py::class_<PyScheduler>(m, "Scheduler")
      .def(py::init<const ts::Config&, const py::object&>(), py::arg("config"), py::kw_only(),
           py::arg("generations") = py::none())
      .def("submit", &PyScheduler::submit, py::arg("sequence_id"), py::arg("token_ids"), py::kw_only(),
           py::arg("output_start"), py::arg("tokens_max"), py::arg("stop_token_ids") = std::vector<ts::TokenId>(),
           py::arg("priority") = 0, py::arg("salt") = py::bytes(), py::arg("tenant") = py::bytes(),
           py::arg("parent") = py::none(), py::arg("parent_tokens") = py::none(),
           py::arg("handover") = ts::Handover::none, py::arg("tools") = false, py::arg("expected_tokens") = 0,
           py::arg("tps_floor") = 0, py::arg("now_us"))
      .def(
          "handle",
          [](PyScheduler& self, std::uint64_t id, ts::HandleEvent event) { return self.scheduler.handle(id, event); },
          py::arg("sequence_id"), py::arg("event"))
      .def(
          "handle_state", [](const PyScheduler& self, std::uint64_t id) { return self.scheduler.handle_state(id); },
          py::arg("sequence_id"))
      .def(
          "readable",
          [](const PyScheduler& self, std::uint64_t id, std::size_t first) {
            return blocks_of(self.scheduler.readable(id, first));
          },
          py::arg("sequence_id"), py::arg("first") = 0)
      .def(
          "sealed_block",
          [](const PyScheduler& self, const py::bytes& hash) {
            return self.scheduler.sealed_block(ts::from_bytes(key_of(hash, "block_hash")));
          },
          py::arg("block_hash"))
      .def_property_readonly("generations", &generations_of)
      .def("take_reserved", &take_reserved)
      .def(
          "import_blocks",
          [](const PyScheduler& self, std::uint64_t id) { return blocks_of(self.scheduler.import_blocks(id)); },
          py::arg("sequence_id"))
      .def(
          "imported",
          [](PyScheduler& self, std::uint64_t id, ts::TokenId token) { return self.scheduler.imported(id, token); },
          py::arg("sequence_id"), py::arg("token_id"))
      .def(
          "import_stopped",
          [](PyScheduler& self, std::uint64_t id, std::optional<ts::TokenId> token) {
            return self.scheduler.import_stopped(id, token);
          },
          py::arg("sequence_id"), py::arg("token_id") = py::none())
      .def(
          "abort", [](PyScheduler& self, std::uint64_t id, std::int64_t now) { return self.scheduler.abort(id, now); },
          py::arg("sequence_id"), py::arg("now_us"))
      .def("plan", &PyScheduler::plan, py::arg("now_us"))
      .def("draft", &PyScheduler::draft, py::arg("sequence_id"), py::arg("token_ids"))
      .def("commit", &PyScheduler::commit, py::arg("step"), py::arg("token_ids"), py::arg("now_us"),
           py::arg("run_us") = py::none())
      .def("take_copies", &PyScheduler::take_copies)
      .def("copied", &PyScheduler::copies_ended<true>, py::arg("ids"))
      .def("copy_failed", &PyScheduler::copies_ended<false>, py::arg("ids"))
      .def("copy_deadline_us", [](const PyScheduler& self) { return self.scheduler.copy_deadline_us(); })
      .def("take_late_copies", [](PyScheduler& self) { return self.scheduler.take_late_copies(); })
      .def_property_readonly("block_table", &block_table)
      .def("counts", [](const PyScheduler& self) { return self.scheduler.counts(); })
      .def("token_ids", &sequence_tokens, py::arg("sequence_id"))
      .def("take_cache_events", &cache_events)
      .def("check", &PyScheduler::check)
      .def("reuse", [](const PyScheduler& self) { return reuse_rows(self.scheduler); })
      .def_property_readonly("bookkeeping_bytes_per_block",
                             [](const PyScheduler& self) { return self.scheduler.bookkeeping_bytes_per_block(); })
      .def(
          "why", [](const PyScheduler& self, std::uint64_t id) { return self.scheduler.why(id); },
          py::arg("sequence_id"))
      .def("cost_model", [](const PyScheduler& self) { return self.scheduler.cost_model(); })
      .def(
          "explanation", [](const PyScheduler& self, std::uint64_t id) { return explanation(self.scheduler, id); },
          py::arg("sequence_id"))
      .def(
          "explain", [](const PyScheduler& self, std::uint64_t id) { return self.scheduler.explain(id); },
          py::arg("sequence_id"));
}

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.doc() = "The scheduler: a state machine without clock, thread, socket or tensor.";
  bind_values(m);
  bind_handover(m);
  bind_policy(m);
  bind_memory(m);
  bind_tier(m);
  bind_drafts(m);
  bind_steps(m);
  bind_scheduler(m);
  m.def("block_hashes", &block_hashes, py::arg("token_ids"), py::kw_only(), py::arg("block_tokens"),
        py::arg("hash_key"), py::arg("model_identity"), py::arg("salt") = py::bytes());
  bind_tables(m);
}
