#include "packed.hpp"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "packed_rows.hpp"
#include "pool.hpp"
#include "winners.hpp"

namespace tokenrelay {
namespace {

constexpr int64_t kPanelMax = 4;  // blocks of a task
constexpr int64_t kPanelColumns = kPanelMax * kBlockColumns;
constexpr int64_t kPanelBytes = int64_t{128} << 10;  // of weights that rows pass over again and again, and of the next
constexpr int64_t kRowsBytes = int64_t{512}
                               << 10;  // of activations that pass over a panel: they stay in a core's cache
constexpr int64_t kCopied = 64;        // rows of a task
constexpr int64_t kPassRows = 8;       // with which products run at their best

const char* at(const void* base, int64_t elements, DType dtype) {
  return static_cast<const char*>(base) + elements * size_of(dtype);
}
char* at(void* base, int64_t elements, DType dtype) { return static_cast<char*>(base) + elements * size_of(dtype); }

class Product {
 public:
  Product(const Table& table, const PackedLinear& job)
      : table_(table),
        job_(job),
        kernels_(packed_kernels(job.weights.bits)),
        rows_(kernels_, job.dtype, job.x, job.rows, job.x_stride, job.weights) {}

  void run() const {
    const int64_t together = max_of(64, kRowsBytes / max_of(1, rows_.bytes()) / kPassRows * kPassRows);
    // One pass reads as many streams as it can; several keep this panel and the next one in a core's cache.
    const bool once = Passes(job_.rows, kernels_.rows).count() == 1;
    const int64_t width = once || kPanelMax * job_.weights.block_bytes() <= kPanelBytes ? kPanelMax : kPanelMax / 2;
    const int64_t panels = ceil_div(job_.weights.blocks(), width), tasks = panels * ceil_div(job_.rows, together);
    // Panels run faster than row blocks: a thread's activations stay in its cache from panel to panel.
    parallel_for(tasks, [&](int64_t task) {
      const int64_t first = task / panels * together, next = task + threads();  // most likely this thread's
      panel(task % panels * width, width, first, min_of(job_.rows, first + together),
            next < tasks ? next % panels * width : -1);
    });
  }

 private:
  // `next`: the first block of the panel after this one, or -1.
  void panel(int64_t block, int64_t width, int64_t first, int64_t last, int64_t next) const {
    const PackedWeights& w = job_.weights;
    const int64_t blocks = min_of(width, w.blocks() - block), column = block * kBlockColumns;
    const int64_t columns = min_of(blocks * kBlockColumns, w.columns - column);
    alignas(64) float product[kPackedRowsMax * kPanelColumns], bias[kPanelColumns];
    if (job_.bias != nullptr) {
      table_.convert(job_.dtype, at(job_.bias, column, job_.dtype), DType::float32, bias, columns);
    }
    const Passes passes(last - first, kernels_.rows);
    const char* after = next < 0 ? nullptr : w.data + next * w.block_bytes();
    for (int64_t pass = 0; pass < passes.count(); ++pass) {
      const int64_t r = first + passes.begin(pass), count = first + passes.begin(pass + 1) - r;
      const Fetch fetch = passes.fetch(pass, after, blocks * w.block_bytes());
      kernels_.dot({&w, block, blocks, rows_.row(r), rows_.bytes(), count, product, kPanelColumns, fetch});
      for (int64_t i = 0; i < count; ++i) {
        float* from = product + i * kPanelColumns;
        if (job_.bias != nullptr) table_.axpy(1.0f, bias, from, columns);
        if (job_.winners != nullptr) {
          contend(table_, job_.winners[r + i], from, columns, column);
          continue;
        }
        void* to = at(job_.out, (r + i) * job_.weights.columns + column, job_.out_dtype);
        table_.convert(DType::float32, from, job_.out_dtype, to, columns);
      }
    }
  }

  const Table& table_;
  const PackedLinear& job_;
  const PackedKernels& kernels_;
  const PackedRows rows_;
};

// Nibbles of one row's chunk, as integer.hpp lays them, in the order of packed.hpp.
void turn_nibbles(const uint8_t* chunk, uint8_t* to) {
  const auto element = [&](int64_t e) {
    return static_cast<uint8_t>(e < kChunk / 2 ? chunk[e] & 15 : chunk[e - kChunk / 2] >> 4);
  };
  for (int64_t k = 0; k < kChunk / 8; ++k) {
    for (int64_t j = 0; j < 4; ++j) {
      to[k * 4 + j] = static_cast<uint8_t>(element(8 * k + j) | (element(8 * k + 4 + j) << 4));
    }
  }
}

void pack_block(const PackedWeights& w, int64_t block, const char* rows, char* data) {
  const int64_t row_bytes = w.bits == 16 ? w.depth * 2 : w.chunks() * kChunk * w.bits / 8;
  const int64_t words = w.block_bytes() / (kBlockColumns * 4);
  const uint32_t nothing = w.bits == 16 ? 0 : w.bits == 8 ? 0x80808080u : 0x88888888u;
  std::vector<uint32_t> line(static_cast<size_t>(words));
  for (int64_t c = 0; c < kBlockColumns; ++c) {
    const int64_t column = block * kBlockColumns + c;
    std::fill(line.begin(), line.end(), nothing);
    if (column < w.columns && w.bits == 4) {
      const auto* from = reinterpret_cast<const uint8_t*>(rows + column * row_bytes);
      for (int64_t chunk = 0; chunk < w.chunks(); ++chunk) {
        turn_nibbles(from + chunk * kChunk / 2, reinterpret_cast<uint8_t*>(line.data()) + chunk * kChunk / 2);
      }
    } else if (column < w.columns) {
      line.back() = nothing;
      std::memcpy(line.data(), rows + column * row_bytes, static_cast<size_t>(row_bytes));
    }
    for (int64_t k = 0; k < words; ++k) {
      std::memcpy(data + block * w.block_bytes() + (k * kBlockColumns + c) * 4, &line[static_cast<size_t>(k)], 4);
    }
  }
}

}  // namespace

PackedRows::PackedRows(const PackedKernels& kernels, DType dtype, const void* x, int64_t rows, int64_t stride,
                       const PackedWeights& beside)
    : base_(static_cast<const char*>(x)), step_(stride * size_of(dtype)), length_(beside.depth * size_of(dtype)) {
  const int64_t depth = beside.depth;
  if (kernels.quantize != nullptr) {
    step_ = length_ = PackedRow::bytes(beside.chunks());
    memory_.resize(static_cast<size_t>(rows * step_));
    const auto quantize = [&](int64_t r) {
      kernels.quantize(dtype, at(x, r * stride, dtype), depth, memory_.data() + r * step_);
    };
    if (rows < 4) {
      for (int64_t r = 0; r < rows; ++r) quantize(r);  // not worth waking anybody
    } else {
      parallel_for(rows, quantize);
    }
    base_ = memory_.data();
  } else if (dtype != DType::bfloat16) {
    throw std::invalid_argument("packed bfloat16 weights take bfloat16 activations");
  } else if (depth % 2 != 0) {  // the last pair needs a zero
    step_ = length_ = (depth + 1) * 2;
    memory_.assign(static_cast<size_t>(rows * step_), 0);
    for (int64_t r = 0; r < rows; ++r) {
      std::memcpy(memory_.data() + r * step_, at(x, r * stride, dtype), static_cast<size_t>(depth * 2));
    }
    base_ = memory_.data();
  }
}

std::vector<char> PackedRows::gathered(const std::vector<int64_t>& numbers) const {
  std::vector<char> copies(numbers.size() * static_cast<size_t>(length_));
  parallel_for(ceil_div(static_cast<int64_t>(numbers.size()), kCopied), [&](int64_t task) {
    for (int64_t i = task * kCopied; i < min_of(static_cast<int64_t>(numbers.size()), (task + 1) * kCopied); ++i) {
      std::memcpy(copies.data() + i * length_, row(numbers[static_cast<size_t>(i)]), static_cast<size_t>(length_));
    }
  });
  return copies;
}

Passes::Passes(int64_t rows, int64_t together)
    : rows_(rows), count_(max_of(1, ceil_div(rows - (together - kPassRows), kPassRows))) {}

Fetch Passes::fetch(int64_t pass, const char* next, int64_t bytes) const {
  if (next == nullptr || count_ == 1) return {};
  const int64_t every = count_ == 2 ? 1 : (count_ <= 4 ? 2 : 4);  // steps from line to line: 2 * every passes fetch all
  if (pass >= 2 * every) return {};
  return {next + bytes / 64 * pass / (2 * every) * 64, every - 1};
}

void check(const PackedWeights& w) {
  const bool known =
      w.bits == 16 || w.bits == 8 ? w.group == 0 : w.bits == 4 && (w.group == 32 || w.group == 64 || w.group == 128);
  if (!known) {
    throw std::invalid_argument("packed weights of " + std::to_string(w.bits) + " bits in groups of " +
                                std::to_string(w.group) + ": expected 16 or 8 bits, or 4 in groups of 32, 64 or 128");
  }
}

bool packs(int bits) {
#if defined(__x86_64__)
  if (bits == 16) return isa_runs(Isa::avx512bf16);
  const auto features = isa_features();
  return (bits == 8 || bits == 4) && isa_runs(Isa::avx512) &&
         std::find(features.begin(), features.end(), "avx512_vnni") != features.end();
#else
  (void)bits;
  return false;
#endif
}

const PackedKernels& packed_kernels(int bits) {
#if defined(__x86_64__)
  static const bool pairs = packs(16), integers = packs(8);  // asking the processor costs a trap in a virtual machine
  if (bits == 16 ? pairs : integers) return bits == 16 ? packed_kernels_bf16() : packed_kernels_vnni();
#endif
  throw std::invalid_argument("this machine or build has no kernels for packed weights of " + std::to_string(bits) +
                              " bits");
}

void pack(const PackedWeights& shape, const void* rows, const float* row_scales, void* data, float* scales) {
  check(shape);
  parallel_for(shape.blocks(), [&](int64_t block) {
    pack_block(shape, block, static_cast<const char*>(rows), static_cast<char*>(data));
    const int64_t groups = shape.block_scales() / kBlockColumns;
    for (int64_t i = 0; shape.bits != 16 && i < shape.block_scales(); ++i) {
      const int64_t column = block * kBlockColumns + i % kBlockColumns;
      scales[block * shape.block_scales() + i] =
          column < shape.columns ? row_scales[column * groups + i / kBlockColumns] : 0.0f;
    }
  });
}

void packed_linear(const Table& table, const PackedLinear& job) {
  check(job.weights);
  if (job.rows > 0) Product(table, job).run();
}

}  // namespace tokenrelay
