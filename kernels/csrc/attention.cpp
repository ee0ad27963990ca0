#include "attention.hpp"

#include <algorithm>
#include <stdexcept>
#include <string>
#include <vector>

#include "pool.hpp"

namespace tokenrelay {
namespace {

constexpr int64_t kUnitRowsMin = 64;                  // query rows that share a pass over the cache, at least
constexpr int64_t kPartialBytes = int64_t{16} << 20;  // of unmerged results kept at once

// Scratch slots of a thread.
enum Use { kQueries, kScores, kPartial, kState, kAddresses, kVisible, kWave };

const char* at(const void* base, int64_t elements, DType dtype) {
  return static_cast<const char*>(base) + elements * size_of(dtype);
}
char* at(void* base, int64_t elements, DType dtype) { return static_cast<char*>(base) + elements * size_of(dtype); }

// Some tokens x some heads of one row of the step. Query rows are (token, head), the head running faster.
struct Unit {
  int64_t row, token, tokens, head, heads;
  int64_t start;     // absolute position of the first token
  int64_t kv_heads;  // that the heads read; more than 1 only for one token
  int64_t rows() const { return tokens * heads; }
  int64_t context() const { return start + tokens; }
  int64_t runs() const { return ceil_div(context(), kRunTokens); }
  int64_t work() const { return rows() * context(); }
};

void refuse(const std::string& what) { throw std::invalid_argument(what); }

// Tokens from `row` on that follow each other in one sequence: a draft comes as rows of one token, whose queries share
// a pass over the cache like the tokens of a chunk.
int64_t tokens_in_line(const StepRows& rows, int64_t row) {
  int64_t tokens = rows.lengths[row];
  if (tokens != 1) return tokens;
  for (int64_t next = row + 1; next < rows.last && rows.lengths[next] == 1; ++next, ++tokens) {
    const bool follows = rows.slots[next] == rows.slots[row] && rows.starts[next] == rows.starts[row] + tokens &&
                         rows.offsets[next] == rows.offsets[row] + tokens;
    if (!follows) break;
  }
  return tokens;
}

// How units are cut; no bit depends on it.
struct Cut {
  int64_t rows;      // of a unit, at most
  int64_t kv_heads;  // that a unit of one token reads, at most
};

std::vector<Unit> make_units(const StepRows& rows, const PagedCache& cache, const Queries& queries, const Cut& cut) {
  std::vector<Unit> units;
  const int64_t group = queries.heads / cache.kv_heads;  // query heads that read one KV head
  const int64_t heads = min_of(group, cut.rows);
  const int64_t tokens = max_of(1, cut.rows / heads);
  for (int64_t row = rows.first; row < rows.last;) {
    const int64_t first = rows.offsets[row] - rows.token_base, count = tokens_in_line(rows, row);
    const int64_t together = count == 1 && heads == group ? cut.kv_heads : 1;
    for (int64_t t = 0; t < count; t += tokens) {
      for (int64_t kv = 0; kv < cache.kv_heads; kv += together) {
        const int64_t kv_heads = min_of(together, cache.kv_heads - kv);
        for (int64_t h = 0; h < group; h += heads) {
          units.push_back({row, first + t, min_of(tokens, count - t), kv * group + h,
                           min_of(heads, group - h) * kv_heads, rows.starts[row] + t, kv_heads});
        }
      }
    }
    row += rows.lengths[row] == 1 ? count : 1;
  }
  return units;
}

// What the inner loops like best, less where the threads would not all have work.
Cut cut_for(const StepRows& rows, const PagedCache& cache, const Queries& queries, const AttendNeeds& needs) {
  const int64_t group = queries.heads / cache.kv_heads;
  Cut cut{needs.rows, max_of(1, min_of(needs.held / group, cache.kv_heads))};
  int64_t tokens = 0, runs = 0;
  for (int64_t row = rows.first; row < rows.last; ++row) {
    tokens += rows.lengths[row];
    runs += ceil_div(rows.starts[row] + rows.lengths[row], kRunTokens);
  }
  while (cut.rows > kUnitRowsMin && tokens * queries.heads < cut.rows * 4 * threads()) cut.rows /= 2;
  while (cut.kv_heads > 1 && runs * cache.kv_heads < cut.kv_heads * 8 * threads()) cut.kv_heads /= 2;
  return cut;
}

// Copies the unit's queries, in the type that the dot products want: [rows, da + db].
const void* pack_queries(const Table& table, DType dtype, const Queries& q, int64_t token, int64_t tokens, int64_t head,
                         int64_t heads) {
  const DType wanted = table.q_type(dtype);
  const int64_t width = q.da + q.db;
  char* packed = static_cast<char*>(scratch(kQueries, tokens * heads * width * size_of(wanted)));
  for (int64_t t = 0; t < tokens; ++t) {
    for (int64_t h = 0; h < heads; ++h) {
      char* to = at(packed, (t * heads + h) * width, wanted);
      table.convert(dtype, at(q.a, (token + t) * q.a_token + (head + h) * q.a_head, dtype), wanted, to, q.da);
      if (q.db > 0) {
        table.convert(dtype, at(q.b, (token + t) * q.b_token + (head + h) * q.b_head, dtype), wanted,
                      at(to, q.da, wanted), q.db);
      }
    }
  }
  return packed;
}

struct Partial {
  float *m, *l, *o;
};

int64_t partial_floats(int64_t rows, int64_t dv) { return rows * (dv + 2); }

Partial partial_at(float* base, int64_t rows) { return {base, base + rows, base + 2 * rows}; }

class Attention {
 public:
  Attention(const Table& table, const StepRows& rows, const PagedCache& cache, const Queries& queries,
            const Output& out, float scale)
      : table_(table),
        rows_(rows),
        cache_(cache),
        queries_(queries),
        out_(out),
        scale_(scale),
        needs_(table.attend_needs(cache.dtype, queries.da + queries.db, 0, out.dv)) {}

  void run() {
    for (int64_t row = rows_.first; row < rows_.last; ++row) check_row(rows_, cache_, queries_, row);
    std::vector<Unit> units = make_units(rows_, cache_, queries_, cut_for(rows_, cache_, queries_, needs_));
    int64_t total = 0, longest = 0;
    for (const Unit& unit : units) {
      total += unit.runs();
      longest = max_of(longest, unit.runs());
    }
    // Whole units as tasks where they balance well; else single runs, whose results are merged afterwards. Both give
    // the same bits.
    if (longest * 4 * threads() <= total || longest == 1) {
      // The longest first: threads then finish together.
      std::stable_sort(units.begin(), units.end(), [](const Unit& a, const Unit& b) { return a.work() > b.work(); });
      parallel_for(static_cast<int64_t>(units.size()), [&](int64_t i) { whole(units[static_cast<size_t>(i)]); });
    } else {
      in_waves(units);
    }
  }

 private:
  // The runs of one unit, one after the other.
  void whole(const Unit& unit) const {
    const int64_t rows = unit.rows(), dv = out_.dv;
    const void* q = pack(unit);
    const Partial state = partial_at(static_cast<float*>(scratch(kState, partial_floats(rows, dv) * 4)), rows);
    attend(unit, q, 0, state);
    if (unit.runs() > 1) {
      const Partial next = partial_at(static_cast<float*>(scratch(kPartial, partial_floats(rows, dv) * 4)), rows);
      for (int64_t run = 1; run < unit.runs(); ++run) {
        attend(unit, q, run, next);
        table_.merge(rows, dv, state.m, state.l, state.o, next.m, next.l, next.o);
      }
    }
    finish(unit, state);
  }

  // Units in waves whose unmerged results fit a bound; in each, all runs in parallel, then the merges.
  void in_waves(const std::vector<Unit>& units) const {
    struct Task {
      size_t unit;
      int64_t run, offset;
    };
    for (size_t begin = 0; begin < units.size();) {
      std::vector<Task> tasks;
      int64_t floats = 0;
      size_t end = begin;
      while (end < units.size() && (end == begin || floats * 4 < kPartialBytes)) {
        for (int64_t run = 0; run < units[end].runs(); ++run) {
          tasks.push_back({end, run, floats});
          floats += partial_floats(units[end].rows(), out_.dv);
        }
        ++end;
      }
      float* memory = static_cast<float*>(scratch(kWave, floats * 4));
      const auto partial = [&](const Task& task) { return partial_at(memory + task.offset, units[task.unit].rows()); };
      parallel_for(static_cast<int64_t>(tasks.size()), [&](int64_t i) {
        const Task& task = tasks[static_cast<size_t>(i)];
        attend(units[task.unit], pack(units[task.unit]), task.run, partial(task));
      });
      std::vector<size_t> firsts;  // tasks of run 0
      for (size_t i = 0; i < tasks.size(); ++i) {
        if (tasks[i].run == 0) firsts.push_back(i);
      }
      parallel_for(static_cast<int64_t>(firsts.size()), [&](int64_t i) {
        const size_t first = firsts[static_cast<size_t>(i)];
        const Unit& unit = units[tasks[first].unit];
        const Partial state = partial(tasks[first]);
        for (int64_t run = 1; run < unit.runs(); ++run) {
          const Partial next = partial(tasks[first + static_cast<size_t>(run)]);
          table_.merge(unit.rows(), out_.dv, state.m, state.l, state.o, next.m, next.l, next.o);
        }
        finish(unit, state);
      });
      begin = end;
    }
  }

  const void* pack(const Unit& unit) const {
    return pack_queries(table_, cache_.dtype, queries_, unit.token, unit.tokens, unit.head, unit.heads);
  }

  void attend(const Unit& unit, const void* q, int64_t run, const Partial& to) const {
    const int64_t first = run * kRunTokens;
    const int64_t tokens = min_of(kRunTokens, unit.context() - first);
    const void** k =
        static_cast<const void**>(scratch(kAddresses, 2 * kRunTokens * static_cast<int64_t>(sizeof(void*))));
    const void** v = k + kRunTokens;
    const int64_t kv_head = unit.head / (queries_.heads / cache_.kv_heads);
    const int32_t* blocks = rows_.block_table + rows_.slots[unit.row] * rows_.blocks_max;
    const int64_t step = cache_.token_stride * size_of(cache_.dtype);
    for (int64_t i = 0; i < tokens;) {
      const int64_t offset = (first + i) % cache_.block_tokens;
      const int64_t end = min_of(tokens, i + cache_.block_tokens - offset);
      const char* key = at(cache_.data,
                           blocks[(first + i) / cache_.block_tokens] * cache_.block_stride +
                               offset * cache_.token_stride + kv_head * cache_.head_stride,
                           cache_.dtype);
      for (; i < end; ++i, key += step) {
        k[i] = key;
        v[i] = at(key, cache_.value_offset, cache_.dtype);
      }
    }
    int64_t* visible = static_cast<int64_t*>(scratch(kVisible, unit.rows() * 8));
    for (int64_t r = 0; r < unit.rows(); ++r) visible[r] = unit.start + r / unit.heads + 1;
    float* scores = static_cast<float*>(scratch(kScores, needs_.bytes));
    table_.attend({cache_.dtype, unit.rows() / unit.kv_heads, queries_.da + queries_.db, 0, out_.dv, unit.kv_heads,
                   cache_.head_stride * size_of(cache_.dtype), q, k, nullptr, v, tokens, first, visible, scale_, to.m,
                   to.l, to.o, scores});
  }

  void finish(const Unit& unit, const Partial& state) const {
    for (int64_t r = 0; r < unit.rows(); ++r) {
      const int64_t token = unit.token + r / unit.heads, head = unit.head + r % unit.heads;
      table_.divide(cache_.dtype, out_.dv, state.l[r], state.o + r * out_.dv,
                    at(out_.data, token * out_.token_stride + head * out_.head_stride, cache_.dtype));
    }
  }

  const Table& table_;
  const StepRows& rows_;
  const PagedCache& cache_;
  const Queries& queries_;
  const Output& out_;
  const float scale_;
  const AttendNeeds needs_;
};

}  // namespace

void check_row(const StepRows& rows, const PagedCache& cache, const Queries& queries, int64_t row) {
  const std::string name = "row " + std::to_string(row);
  const int64_t start = rows.starts[row], length = rows.lengths[row], slot = rows.slots[row];
  const int64_t first = rows.offsets[row] - rows.token_base;
  if (start < 0 || length < 0) refuse(name + ": negative start or length");
  if (first < 0 || first + length > queries.tokens) refuse(name + ": its tokens lie outside the queries");
  if (slot < 0 || slot >= rows.slots_total) refuse(name + ": slot " + std::to_string(slot) + " is not in block_table");
  const int64_t needed = ceil_div(start + length, cache.block_tokens);
  if (needed > rows.blocks_max) refuse(name + ": its context is longer than block_table is wide");
  const int32_t* blocks = rows.block_table + slot * rows.blocks_max;
  for (int64_t i = 0; i < needed; ++i) {
    if (blocks[i] < 0 || blocks[i] >= cache.blocks) {
      refuse(name + ": block " + std::to_string(blocks[i]) + " is not in the cache");
    }
  }
}

void paged_attention(const Table& table, const StepRows& rows, const PagedCache& cache, const Queries& queries,
                     const Output& out, float scale) {
  if (cache.kv_heads <= 0 || queries.heads % cache.kv_heads != 0) refuse("query heads must be a multiple of KV heads");
  if (rows.first < 0 || rows.first > rows.last) refuse("the rows must be a range");
  Attention(table, rows, cache, queries, out, scale).run();
}

void dense_attention(const Table& table, const DenseStretch& s, const Queries& queries, float scale, float* m, float* l,
                     float* o) {
  if (s.first % kRunTokens != 0) refuse("a stretch starts at a multiple of the run length");
  const AttendNeeds needs = table.attend_needs(s.dtype, s.dk, s.dk2, s.dv);
  const int64_t blocks = ceil_div(s.q_tokens, needs.rows);
  parallel_for(s.heads * blocks, [&](int64_t index) {
    const int64_t head = index / blocks, token = index % blocks * needs.rows;
    const int64_t rows = min_of(needs.rows, s.q_tokens - token);
    const int64_t context = min_of(s.first + s.tokens, s.q_first + token + rows);
    if (context <= s.first) return;  // the queries stand before this stretch
    const void* q = pack_queries(table, s.dtype, queries, token, rows, head, 1);
    const void** k =
        static_cast<const void**>(scratch(kAddresses, 3 * kRunTokens * static_cast<int64_t>(sizeof(void*))));
    const void **k2 = k + kRunTokens, **v = k2 + kRunTokens;
    int64_t* visible = static_cast<int64_t*>(scratch(kVisible, rows * 8));
    for (int64_t r = 0; r < rows; ++r) visible[r] = s.q_first + token + r + 1;
    float* scores = static_cast<float*>(scratch(kScores, needs.bytes));
    const Partial next = partial_at(static_cast<float*>(scratch(kPartial, partial_floats(rows, s.dv) * 4)), rows);
    const int64_t at_state = head * s.q_tokens + token;
    const Partial state{m + at_state, l + at_state, o + at_state * s.dv};
    for (int64_t begin = s.first; begin < context; begin += kRunTokens) {
      const int64_t tokens = min_of(kRunTokens, context - begin);
      for (int64_t i = 0; i < tokens; ++i) {
        const int64_t at_token = begin - s.first + i;
        k[i] = at(s.k, at_token * s.k_token + head * s.k_head, s.dtype);
        k2[i] = at(s.k2, at_token * s.k2_token, s.dtype);
        v[i] = at(s.v, at_token * s.v_token + head * s.v_head, s.dtype);
      }
      const Partial to = begin == 0 ? state : next;
      table.attend({s.dtype, rows, s.dk, s.dk2, s.dv, 1, 0, q, k, k2, v, tokens, begin, visible, scale, to.m, to.l,
                    to.o, scores});
      if (begin > 0) table.merge(rows, s.dv, state.m, state.l, state.o, next.m, next.l, next.o);
    }
  });
}

void dense_finish(const Table& table, DType dtype, int64_t heads, int64_t q_tokens, const float* l, const float* o,
                  const Output& out) {
  parallel_for(heads, [&](int64_t head) {
    for (int64_t token = 0; token < q_tokens; ++token) {
      const int64_t state = head * q_tokens + token;
      table.divide(dtype, out.dv, l[state], o + state * out.dv,
                   at(out.data, token * out.token_stride + head * out.head_stride, dtype));
    }
  });
}

}  // namespace tokenrelay
