// Orchestration of attend: who works on what, in which order, and how the parts come together.
//
// A work item is (batch row, KV head, block of query rows, range of tiles). Sinks and exact tokens come first: they
// tell what a tile's probabilities are up against. Then, for every tile and groups of up to four query rows, score ->
// mask -> softmax -> accumulate through the kernel table, so any key codec goes with any value codec. Rows in which a
// token stands out are scored again with one more level of the query; the values of a tile whose probabilities are
// negligible for all rows of a group stay unread. Items leave (max, sum, output) per row; the last one of a block
// merges the ranges by log-sum-exp, rotates back, and stores. The split depends on the shapes only: results are the
// same on any number of threads.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <optional>
#include <stdexcept>
#include <string>
#include <thread>

#include "core/attend_item.h"
#include "core/fp_control.h"
#include "kvpack/isa.h"

namespace kvpack {
namespace {

// Merges the ranges of one block of query rows, rotates back, stores.
void merge(const Plan& plan, const KernelTable& k, uint8_t* workspace, int64_t block) {
  const AttendParams& p = plan.p;
  const Block rows(plan, k, workspace, block);
  const Transform transform(k, plan.value, plan.record.value, rows.map(Side::value));
  const auto dv = static_cast<int32_t>(p.value_dim);
  alignas(64) float sum[(kMaxParts + 1) * kMaxHeadDim], weights[kTile];
  for (int64_t r = 0; r < rows.n_rows; ++r) {
    float max = -std::numeric_limits<float>::infinity(), total = 0.0F;
    const int64_t head = rows.query_head(r);
    const float sink = p.sink_logits != nullptr ? p.sink_logits[head] * kLog2e : max;
    bool broken = false;  // by a score that is NaN, as the row is then
    for (int64_t n = 0; n < plan.partials(); ++n) {
      const SoftmaxRow& row = Partial(plan, workspace, block, n).state[r];
      max = std::fmax(max, row.max);
      broken = broken || std::isnan(row.sum);
    }
    max = std::fmax(max, sink);
    std::memset(sum, 0, static_cast<size_t>(plan.out_width) * 4);
    const bool any = max > -std::numeric_limits<float>::infinity();
    // Outputs of the ranges are values of tokens, and their weights probabilities.
    for (int64_t first = 0, count; any && first < plan.partials(); first += count) {
      count = std::min<int64_t>(plan.partials() - first, kTile);
      const Partial part(plan, workspace, block, first);
      for (int64_t n = 0; n < count; ++n) {
        const SoftmaxRow& row = Partial(plan, workspace, block, first + n).state[r];
        weights[n] = std::exp2(row.max - max);
        total += weights[n] * row.sum;
      }
      k.dense_accumulate[static_cast<int>(Dtype::f32)](
          {reinterpret_cast<const uint8_t*>(part.out + r * plan.out_width), static_cast<ptrdiff_t>(plan.item_bytes()),
           nullptr, weights, nullptr, sum, plan.out_width, plan.out_width, static_cast<int32_t>(count), 1});
    }
    if (any) total += std::exp2(sink - max);
    if (plan.value.rotated && any) {
      const float* plain = sum + plan.record.value.width();
      transform.from_parts(sum);
      for (int32_t i = 0; i < dv; ++i) sum[i] += plain[i];
    }
    const float inverse = broken ? std::numeric_limits<float>::quiet_NaN() : total > 0.0F ? 1.0F / total : 0.0F;
    for (int32_t i = 0; i < dv; ++i) sum[i] *= inverse;
    const int64_t at = ((rows.batch * p.query_heads + head) * p.query_tokens + rows.query_token(r)) * dv;
    store_row(sum, p.dtype, dv, p.out + at * dtype_bytes(p.dtype));
  }
}

void check(const Plan& plan) {
  const AttendParams& p = plan.p;
  for (int64_t b = 0; p.rows != nullptr && b < p.batch; ++b) {
    const int32_t pad = p.rows[2 * b], start = p.rows[2 * b + 1];
    if (pad < 0 || start < 0 || (p.sinks > 0 && start > plan.packed + p.exact))
      throw std::invalid_argument("attend: rows[" + std::to_string(b) + "] is (pad " + std::to_string(pad) +
                                  ", sink_start " + std::to_string(start) +
                                  "); allowed: 0 or more, and sink_start at most the " +
                                  std::to_string(plan.packed + p.exact) + " tokens of the stream");
  }
  for (int64_t t = 0; t < p.tiles; ++t)
    if (p.counts[t] < 1 || p.counts[t] > kTile)
      throw std::invalid_argument("attend: tile " + std::to_string(t) + " counts " + std::to_string(p.counts[t]) +
                                  " tokens; allowed: 1..64");
  for (int64_t b = 0; b < p.batch; ++b)
    for (int64_t i = 0; i * kPageTiles < p.tiles; ++i) {
      const int64_t page = p.table[b * p.table_stride + i];
      if (page == 0 || page % kLine != 0)
        throw std::invalid_argument("attend: page " + std::to_string(i) + " of row " + std::to_string(b) +
                                    " has no 64-byte aligned address");
    }
}

// Work that threads take bit by bit: ranges of tiles, of which blocks have one or several, of some neighbouring KV
// heads. A thread begins where the pool puts it and goes on in order; where another one has begun, it turns to the last
// that are left. One that is slower, or comes late, does less.
struct Call {
  const Plan& plan;
  const KernelTable& k;
  uint8_t* workspace;
  const Progress progress;

  // Queries, sinks and exact tokens of a block, before its ranges: by the first that comes for them.
  void start(int64_t block) const {
    int32_t none = Progress::kNone;
    if (!progress.block[block].compare_exchange_strong(none, Progress::kStarting, std::memory_order_relaxed)) return;
    const Item item(plan, k, workspace, block, plan.partials() - 1);
    item.prepare();
    item.begin(nullptr);
    item.exact();
    progress.block[block].store(Progress::kStarted, std::memory_order_release);
  }
  // For the thread that is at it.
  void wait_for(int64_t block) const {
    for (int spins = 0; progress.block[block].load(std::memory_order_acquire) == Progress::kStarting;) {
      if (spins < 1000) {
        ++spins;
        pause();
      } else {
        std::this_thread::yield();
      }
    }
  }
  // Of a loop that waits for another thread, which may share the core.
  static void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
  }
  // Items of one range and neighbouring heads: page by page, head by head.
  void range(int64_t index, int64_t n) const {
    const int64_t rows = index % plan.row_blocks, head = index / plan.row_blocks % plan.p.kv_heads;
    const int64_t rest = index / plan.row_blocks / plan.p.kv_heads;
    const int64_t chunk = rest % plan.chunks, batch = rest / plan.chunks;
    const int64_t begin = chunk * plan.chunk_tiles, end = std::min(begin + plan.chunk_tiles, plan.p.tiles);
    const auto block_of = [&](int64_t i) { return (batch * plan.p.kv_heads + head + i) * plan.row_blocks + rows; };
    std::optional<Item> items[kMostHeads];
    for (int64_t i = 0; i < n; ++i) start(block_of(i));  // those that nobody is at, before there is one to wait for
    for (int64_t i = 0; i < n; ++i) {
      wait_for(block_of(i));
      Item& item = items[i].emplace(plan, k, workspace, block_of(i), chunk);
      if (plan.chunks > 1) {
        const Partial before(plan, workspace, block_of(i), plan.chunks);
        item.begin(&before);
      }
      item.enter(begin);
    }
    for (int64_t t = begin, next; t < end; t = next) {
      next = n == 1 ? end : std::min(t - t % kPageTiles + kPageTiles, end);
      for (int64_t i = 0; i < n; ++i) items[i]->tiles(t, next, *items[i + 1 < n ? i + 1 : 0], i + 1 < n ? t : next);
    }
    for (int64_t i = 0; i < n; ++i) {
      items[i]->count();
      const int32_t last = Progress::kStarted + static_cast<int32_t>(plan.chunks) - 1;
      if (progress.block[block_of(i)].fetch_add(1, std::memory_order_acq_rel) == last)
        merge(plan, k, workspace, block_of(i));
    }
  }
  // How many of `heads` neighbours a thread takes together: as alike as can be.
  int64_t share(int64_t heads) const {
    static_assert(kFewRows <= kRowBlock);  // there is one block of rows, then
    if (plan.block_rows > kFewRows) return 1;
    const int64_t left = progress.left->load(std::memory_order_relaxed), threads = std::max(plan.p.threads, int64_t{1});
    const int64_t most = threads == 1 ? kMostHeads : std::clamp(left / (2 * threads), int64_t{1}, kMostHeads);
    const int64_t parts = (heads + most - 1) / most;
    return (heads + parts - 1) / parts;
  }
  void work(int64_t first) const {
    // The pool calls for every item, and a thread's first call does its share.
    if (progress.left->load(std::memory_order_relaxed) <= 0) return;
    const FpControl flush(FpControl::Mode::flush);
    const int64_t items = plan.items(), heads = plan.p.kv_heads;
    const auto run = [&](int64_t lowest, int64_t n) {
      progress.left->fetch_sub(static_cast<int32_t>(n), std::memory_order_relaxed);
      range(lowest, n);
    };
    for (int64_t i = first; i < items && progress.take(i);) {
      int64_t n = 1;
      for (const int64_t limit = share(heads - i % heads); n < limit && progress.take(i + n);) ++n;
      run(i, n);
      i += n;
    }
    for (int64_t i = items - 1; i >= 0; --i) {
      if (!progress.take(i)) continue;
      int64_t n = 1;
      for (const int64_t limit = share(i % heads + 1); n < limit && progress.take(i - 1); --i) ++n;
      run(i, n);
    }
  }
};

}  // namespace

size_t attend_workspace(const AttendParams& p) {
  const Plan plan(p);
  return plan.bytes();
}

void attend(const AttendParams& p, uint8_t* workspace, ParallelFor parallel) {
  const Plan plan(p);
  check(plan);
  const Call call{plan, kernels(), workspace, Progress(plan, workspace)};
  parallel(
      plan.items(), [](void* context, int64_t i) { static_cast<const Call*>(context)->work(i); },
      const_cast<Call*>(&call));
}

}  // namespace kvpack
