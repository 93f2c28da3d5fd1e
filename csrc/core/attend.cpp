// Orchestration of attend: who works on what, in which order, and how the parts come together.
//
// A work item is (batch row, KV head, block of query rows, range of tiles). For every tile it runs, for groups of up
// to four query rows, score -> mask -> softmax -> accumulate through the kernel table, so any key codec goes with any
// value codec. The item with the last range also takes sinks and exact tokens. Items leave (max, sum, output) per row,
// and a second pass merges the ranges by log-sum-exp, rotates back, and stores. The split depends on the shapes only:
// results are the same on any number of threads.
#include <cmath>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <string>

#include "core/attend_mask.h"
#include "core/attend_plan.h"
#include "core/fp_control.h"
#include "core/transform.h"
#include "kvpack/isa.h"
#include "simd/half.h"

namespace kvpack {
namespace {

// Prefetch distance, into L2. Measured on Zen 4: 1 to 8 tiles are the same within 5 %. No prefetch costs 65 % at exact,
// 30 % at tq4, and 80 % at the codecs of blocks, whose values are read two lines of four at a time.
constexpr int64_t kAheadTiles = 2;

constexpr float kLog2e = 1.44269504088896341F;
// A block of query rows of one (batch row, KV head).
struct Block {
  const Plan& plan;
  const AttendParams& p;
  const KernelTable& k;
  Queries q;
  int64_t batch, head, first_row, n_rows;

  Block(const Plan& pl, const KernelTable& table, uint8_t* workspace, int64_t block)
      : plan(pl), p(pl.p), k(table), q(pl, workspace, block) {
    first_row = block % plan.row_blocks * plan.block_rows;
    head = block / plan.row_blocks % p.kv_heads;
    batch = block / plan.row_blocks / p.kv_heads;
    n_rows = plan.rows - first_row < plan.block_rows ? plan.rows - first_row : plan.block_rows;
  }

  int64_t query_head(int64_t row) const { return head * plan.group + (first_row + row) / p.query_tokens; }
  int64_t query_token(int64_t row) const { return (first_row + row) % p.query_tokens; }

  // The map of the row's last page, null without one.
  const uint8_t* map(Side side) const {
    const SideLayout& s = side == Side::key ? plan.record.key : plan.record.value;
    return s.map_bytes == 0 || p.tiles == 0 ? nullptr : part(p.tiles - 1) + plan.record.map(side);
  }
  // This KV head's part of the page of tile t.
  const uint8_t* part(int64_t t) const {
    const auto page = static_cast<uintptr_t>(p.table[batch * p.table_stride + t / kPageTiles]);
    return reinterpret_cast<const uint8_t*>(page) + static_cast<size_t>(head) * plan.record.head_bytes();
  }

  void prepare() const {
    const auto d = static_cast<int32_t>(p.key_dim);
    const Transform transform(k, plan.key, plan.record.key, map(Side::key));
    for (int64_t r = 0; r < n_rows; ++r) {
      float* row = q.query + r * d;
      load_row(p.query.data + batch * p.query.batch + query_head(r) * p.query.head + query_token(r) * p.query.token,
               p.dtype, d, row);
      for (int32_t i = 0; i < d; ++i) row[i] *= p.scale * kLog2e;
      if (plan.key.bits == 0 || plan.key.elements || plan.key.asymmetric || p.tiles == 0) continue;
      alignas(64) float parts[kMaxParts * kMaxHeadDim];
      transform.to_parts(row, parts);
      if (plan.key_mean) std::memcpy(q.rotated + r * d, parts, static_cast<size_t>(d) * 4);
      for (int32_t n = 0; n < plan.record.key.parts; ++n) {
        const CodePart& part = plan.record.key.part[n];
        k.quantize_query({parts + part.first, part.dims, plan.key.scale_block, q.levels_of(n) + r});
      }
    }
  }
};

struct Item : Block {
  Partial s;
  int64_t chunk;
  CodecCode key_code, value_code;
  MaskRows mask;

  Item(const Plan& pl, const KernelTable& table, uint8_t* workspace, int64_t index)
      : Block(pl, table, workspace, index / pl.chunks),
        s(pl, workspace, index),
        chunk(index % pl.chunks),
        key_code(CodecCode::unpack(p.key_codec)),
        value_code(CodecCode::unpack(p.value_codec)),
        mask(pl.p, pl.packed) {}

  const uint8_t* tile(int64_t t) const { return part(t) + static_cast<size_t>(t % kPageTiles) * plan.record.bytes(); }
  static ConstTileSide section_of(const ConstTileSide& side, const CodePart& part) {
    return {side.codes + part.codes, side.scales + part.scales};
  }
  // Means lie apart from the records, so that no kernel prefetches them on its way.
  void prefetch_mean(Side side, int64_t t, int32_t dim) const {
    const uint8_t* at = part(t) + plan.record.mean(side, t % kPageTiles);
    for (int32_t i = 0; i < dim + kLine; i += kLine) __builtin_prefetch(at + i);
    __builtin_prefetch(part(t) + plan.record.mean_scale(side, t % kPageTiles));
  }
  // The mean that serves tile t; the caller fills in the rows.
  MeanArgs mean(Side side, int64_t t, int32_t dim, int32_t group) const {
    const uint8_t* own = part(t);
    const int64_t slot = t % kPageTiles;
    uint16_t scale;
    std::memcpy(&scale, own + plan.record.mean_scale(side, slot), sizeof scale);
    return {reinterpret_cast<const int8_t*>(own + plan.record.mean(side, slot)),
            half_to_float(scale),
            dim,
            group,
            dim,
            nullptr,
            nullptr,
            nullptr};
  }

  // After score: soft cap, mask, one step of softmax. `tokens` scores are real, the rest of the 64 is not.
  void weigh(float* scores, int64_t row, int32_t group, const KeyRun& run, const uint8_t* ahead, int32_t ahead_lines) {
    if (p.softcap > 0.0F) k.softcap(scores, group * kTile, p.softcap);
    for (int32_t g = 0; g < group; ++g)
      mask.apply(scores + g * kTile, batch, query_head(row + g), query_token(row + g), run);
    k.softmax({scores, s.state + row, s.out + row * plan.out_width, ahead, ahead_lines, group, plan.out_width});
  }

  void tiles(int64_t begin, int64_t end) {
    alignas(64) float scores[kMaxGroup * kTile];
    const int32_t levels = p.precision == Precision::high ? 2 : 1;
    const auto dk = static_cast<int32_t>(p.key_dim), dv = static_cast<int32_t>(p.value_dim);
    int64_t start = 0;
    for (int64_t t = 0; t < begin; ++t) start += p.counts[t];
    for (int64_t t = begin; t < end; ++t) {
      const uint8_t* record = tile(t);
      const int64_t next = t + kAheadTiles < p.tiles ? t + kAheadTiles : t;
      const uint8_t* coming = tile(next);
      if (plan.key_mean) prefetch_mean(Side::key, next, dk);
      if (plan.value_mean) prefetch_mean(Side::value, next, dv);
      const auto section = [&](const uint8_t* base, size_t codes, size_t scales) {
        return ConstTileSide{base + codes, reinterpret_cast<const uint16_t*>(base + scales)};
      };
      const ConstTileSide key = section(record, plan.record.key_codes(), plan.record.key_scales());
      const ConstTileSide value = section(record, plan.record.value_codes(), plan.record.value_scales());
      for (int64_t row = 0; row < n_rows; row += kMaxGroup) {
        const auto group = static_cast<int32_t>(n_rows - row < kMaxGroup ? n_rows - row : kMaxGroup);
        // The first group of rows brings the tile from memory, the others find it in the cache.
        const uint8_t* ahead = row == 0 ? coming : record;
        const uint8_t* ahead_keys = ahead + plan.record.key_codes();
        const uint8_t* ahead_values = ahead + plan.record.value_codes();
        if (plan.key.bits == 0)
          k.exact_score[static_cast<int>(key_code.dtype)][group - 1](
              {nullptr, q.query + row * dk, key, ahead_keys, scores, dk, levels, false});
        else
          for (int32_t n = 0; n < plan.record.key.parts; ++n) {
            const CodePart& part = plan.record.key.part[n];
            k.score[part.reader][group - 1]({q.levels_of(n) + row, q.query + row * dk, section_of(key, part),
                                             ahead_keys + part.codes, scores, part.dims, levels, n != 0});
          }
        if (plan.key_mean) {
          MeanArgs centre = mean(Side::key, t, dk, group);
          centre.query = q.rotated + row * dk;
          centre.scores = scores;
          k.score_mean(centre);
        }
        weigh(scores, row, group, {start, p.counts[t], KeyRun::Kind::stream}, ahead,
              static_cast<int32_t>(plan.record.key_codes() / kLine));
        float* out = s.out + row * plan.out_width;
        if (plan.value.bits == 0) {
          const ptrdiff_t stride = static_cast<ptrdiff_t>(dv) * dtype_bytes(value_code.dtype);
          k.dense_accumulate[static_cast<int>(value_code.dtype)](
              {value.codes, stride, nullptr, scores, ahead_values, out, plan.out_width, dv, kTile, group});
        } else {
          for (int32_t n = 0; n < plan.record.value.parts; ++n) {
            const CodePart& part = plan.record.value.part[n];
            k.accumulate[part.reader][group - 1]({scores, section_of(value, part), ahead_values + part.codes,
                                                  out + part.first, plan.out_width, part.dims, levels,
                                                  static_cast<int32_t>(t * 5 % kTile)});
          }
        }
        if (plan.value_mean) {
          MeanArgs centre = mean(Side::value, t, dv, group);
          centre.stride = plan.out_width;
          centre.scores = scores;
          centre.out = out;
          k.accumulate_mean(centre);
        }
      }
      start += p.counts[t];
    }
  }

  // Sinks or exact tokens, blocks of 64 rows of elements.
  void dense(const Strided& keys, const Strided& values, int64_t tokens, int64_t start, KeyRun::Kind kind) {
    alignas(64) float scores[kMaxGroup * kTile];
    const auto dk = static_cast<int32_t>(p.key_dim), dv = static_cast<int32_t>(p.value_dim);
    const int type = static_cast<int>(p.dtype);
    for (int64_t t = 0; t < tokens; t += kTile) {
      const auto n = static_cast<int32_t>(tokens - t < kTile ? tokens - t : kTile);
      const uint8_t* key = keys.data + batch * keys.batch + head * keys.head + t * keys.token;
      const uint8_t* value = values.data + batch * values.batch + head * values.head + t * values.token;
      for (int64_t row = 0; row < n_rows; row += kMaxGroup) {
        const auto group = static_cast<int32_t>(n_rows - row < kMaxGroup ? n_rows - row : kMaxGroup);
        k.dense_score[type]({key, keys.token, q.query + row * dk, scores, nullptr, nullptr, 0, dk, n, group});
        weigh(scores, row, group, {start + t, n, kind}, nullptr, 0);
        float* out = s.out + row * plan.out_width + (plan.out_width - dv);
        k.dense_accumulate[type]({value, values.token, nullptr, scores, nullptr, out, plan.out_width, dv, n, group});
      }
    }
  }

  void run() {
    const FpControl flush(FpControl::Mode::flush);
    if (plan.chunks == 1) prepare();
    for (int64_t r = 0; r < n_rows; ++r) s.state[r] = {-std::numeric_limits<float>::infinity(), 0.0F};
    std::memset(s.out, 0, static_cast<size_t>(n_rows) * static_cast<size_t>(plan.out_width) * 4);
    const int64_t begin = chunk * plan.chunk_tiles;
    tiles(begin, begin + plan.chunk_tiles < p.tiles ? begin + plan.chunk_tiles : p.tiles);
    if (chunk == plan.chunks - 1) {
      dense(p.sink_keys, p.sink_values, p.sinks, 0, KeyRun::Kind::sinks);
      dense(p.keys, p.values, p.exact, plan.packed, KeyRun::Kind::exact);
    }
  }
};

// Merges the ranges of one block of query rows, rotates back, stores.
void merge(const Plan& plan, const KernelTable& k, uint8_t* workspace, int64_t block) {
  const FpControl flush(FpControl::Mode::flush);
  const AttendParams& p = plan.p;
  const Block rows(plan, k, workspace, block);
  const Transform transform(k, plan.value, plan.record.value, rows.map(Side::value));
  const auto dv = static_cast<int32_t>(p.value_dim);
  alignas(64) float sum[(kMaxParts + 1) * kMaxHeadDim];
  for (int64_t r = 0; r < rows.n_rows; ++r) {
    float max = -std::numeric_limits<float>::infinity(), total = 0.0F;
    const int64_t head = rows.query_head(r);
    const float sink = p.sink_logits != nullptr ? p.sink_logits[head] * kLog2e : max;
    for (int64_t c = 0; c < plan.chunks; ++c)
      max = std::fmax(max, Partial(plan, workspace, block * plan.chunks + c).state[r].max);
    max = std::fmax(max, sink);
    std::memset(sum, 0, sizeof sum);
    const bool any = max > -std::numeric_limits<float>::infinity();
    for (int64_t c = 0; any && c < plan.chunks; ++c) {
      const Partial part(plan, workspace, block * plan.chunks + c);
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

struct Call {
  const Plan& plan;
  const KernelTable& k;
  uint8_t* workspace;
};

}  // namespace

size_t attend_workspace(const AttendParams& p) {
  const Plan plan(p);
  return plan.bytes();
}

void attend(const AttendParams& p, uint8_t* workspace, ParallelFor parallel) {
  const Plan plan(p);
  check(plan);
  const Call call{plan, kernels(), workspace};
  if (plan.chunks > 1)
    parallel(
        plan.blocks(),
        [](void* context, int64_t i) {
          const FpControl flush(FpControl::Mode::flush);
          const Call& c = *static_cast<const Call*>(context);
          Block(c.plan, c.k, c.workspace, i).prepare();
        },
        const_cast<Call*>(&call));
  parallel(
      plan.items(),
      [](void* context, int64_t i) {
        const Call& c = *static_cast<const Call*>(context);
        Item(c.plan, c.k, c.workspace, i).run();
      },
      const_cast<Call*>(&call));
  parallel(
      plan.blocks(),
      [](void* context, int64_t i) {
        const Call& c = *static_cast<const Call*>(context);
        merge(c.plan, c.k, c.workspace, i);
      },
      const_cast<Call*>(&call));
}

}  // namespace kvpack
