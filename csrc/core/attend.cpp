// Orchestration of attend: who works on what, in which order, and how the parts come together.
//
// A work item is (batch row, KV head, block of query rows, range of tiles). Sinks and exact tokens come first: they
// tell what a tile's probabilities are up against. Then, for every tile and groups of up to four query rows, score ->
// mask -> softmax -> accumulate through the kernel table, so any key codec goes with any value codec. Rows in which a
// token stands out are scored again with one more level of the query; the values of a tile whose probabilities are
// negligible for all rows of a group stay unread. Items leave (max, sum, output) per row; the last one of a block
// merges the ranges by log-sum-exp, rotates back, and stores. The split depends on the shapes only: results are the
// same on any number of threads.
#include <cmath>
#include <cstring>
#include <limits>
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
  alignas(64) float sum[(kMaxParts + 1) * kMaxHeadDim];
  for (int64_t r = 0; r < rows.n_rows; ++r) {
    float max = -std::numeric_limits<float>::infinity(), total = 0.0F;
    const int64_t head = rows.query_head(r);
    const float sink = p.sink_logits != nullptr ? p.sink_logits[head] * kLog2e : max;
    for (int64_t n = 0; n < plan.partials(); ++n) max = std::fmax(max, Partial(plan, workspace, block, n).state[r].max);
    max = std::fmax(max, sink);
    std::memset(sum, 0, sizeof sum);
    const bool any = max > -std::numeric_limits<float>::infinity();
    for (int64_t n = 0; any && n < plan.partials(); ++n) {
      const Partial part(plan, workspace, block, n);
      const float weight = std::exp2(part.state[r].max - max);
      const float* out = part.out + r * plan.out_width;
      if (weight == 0.0F) continue;
      total += weight * part.state[r].sum;
      for (int32_t i = 0; i < plan.out_width; ++i) sum[i] += weight * out[i];
    }
    if (any) total += std::exp2(sink - max);
    if (plan.value.rotated && any) {
      const float* plain = sum + plan.record.value.width();
      transform.from_parts(sum);
      for (int32_t i = 0; i < dv; ++i) sum[i] += plain[i];
    }
    const float inverse = total > 0.0F ? 1.0F / total : 0.0F;
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

// Work that threads take item by item: ranges of tiles, of which blocks have one or several. A thread begins where the
// pool puts it and goes on in order, as ranges of a block prefetch into the next; where another one has begun, it turns
// to the last items that are left. One that is slower, or comes late, does less.
struct Call {
  const Plan& plan;
  const KernelTable& k;
  uint8_t* workspace;
  const Progress progress;

  // Queries, sinks and exact tokens of a block, before its ranges: by the first that needs them. The others wait for
  // it, as it is at work.
  void start(int64_t block) const {
    std::atomic<int32_t>& state = progress.block[block];
    int32_t none = Progress::kNone;
    if (state.compare_exchange_strong(none, Progress::kStarting, std::memory_order_relaxed)) {
      const Item item(plan, k, workspace, block, plan.partials() - 1);
      item.prepare();
      item.begin(nullptr);
      item.exact();
      state.store(Progress::kStarted, std::memory_order_release);
    }
    for (int spins = 0; state.load(std::memory_order_acquire) == Progress::kStarting;) {
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
  void range(int64_t index) const {
    const int64_t block = index / plan.chunks, chunk = index % plan.chunks, begin = chunk * plan.chunk_tiles;
    const int64_t end = begin + plan.chunk_tiles;
    start(block);
    Item item(plan, k, workspace, block, chunk);
    if (plan.chunks > 1) {
      const Partial before(plan, workspace, block, plan.chunks);
      item.begin(&before);
    }
    item.tiles(begin, end < plan.p.tiles ? end : plan.p.tiles);
    item.count();
    const int32_t last = Progress::kStarted + static_cast<int32_t>(plan.chunks) - 1;
    if (progress.block[block].fetch_add(1, std::memory_order_acq_rel) == last) merge(plan, k, workspace, block);
  }
  void work(int64_t first) const {
    if (progress.all_taken()) return;  // the pool calls for every item, and a thread's first call does its share
    const FpControl flush(FpControl::Mode::flush);
    const int64_t n = plan.items();
    for (int64_t i = first; i < n && progress.take(i); ++i) range(i);
    for (int64_t i = n - 1; i >= 0; --i)
      if (progress.take(i)) range(i);
    progress.set_all_taken();
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
