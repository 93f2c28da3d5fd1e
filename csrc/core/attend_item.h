// What a work item of attend does: its queries, and the walk over tiles, sinks and exact tokens that leaves a partial
// result behind (attend.cpp says what a work item is).
#pragma once
#include <algorithm>
#include <cstring>
#include <limits>

#include "core/attend_mask.h"
#include "core/attend_plan.h"
#include "core/transform.h"
#include "simd/half.h"

namespace kvpack {

// Prefetch distance: two tiles, or one where two are more than this. Measured on Zen 5, into L1: one instead of two
// takes 11 % off the time of q8_0 at d = 128 and 3 % off that of exact and q4_0, but adds 2 to 4 % to tq2 and tq3, and
// 6 % to tq4 at d = 64. No prefetch doubles the time. On Zen 4, into L2, 1 to 8 tiles are the same within 5 %.
constexpr size_t kAheadBytes = size_t{16} * 1024;

// A token with more than this share of a row's probability so far gets its score from one more level of the query.
// Errors of scores go into the output in proportion to the share: what is left of them is a quarter, or less.
constexpr float kNotable = 1.0F / 16.0F;

constexpr float kLog2e = 1.44269504088896341F;
// A block of query rows of one (batch row, KV head).
struct Block {
  const Plan& plan;
  const AttendParams& p;
  const KernelTable& k;
  Queries q;
  int64_t batch, head, first_row, n_rows;
  size_t head_offset;  // of a page

  Block(const Plan& pl, const KernelTable& table, uint8_t* workspace, int64_t block)
      : plan(pl), p(pl.p), k(table), q(pl, workspace, block) {
    first_row = block % plan.row_blocks * plan.block_rows;
    head = block / plan.row_blocks % p.kv_heads;
    batch = block / plan.row_blocks / p.kv_heads;
    n_rows = plan.rows - first_row < plan.block_rows ? plan.rows - first_row : plan.block_rows;
    head_offset = static_cast<size_t>(head) * plan.record.head_bytes();
  }

  // Keys that meet queries as levels of int8.
  bool integer_keys() const {
    return plan.key.bits != 0 && (!plan.key.elements || (k.fixed_point && plan.levels == 1));
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
    return reinterpret_cast<const uint8_t*>(page) + head_offset;
  }

  void prepare() const {
    const auto d = static_cast<int32_t>(p.key_dim);
    const Transform transform(k, plan.key, plan.record.key, map(Side::key));
    for (int64_t r = 0; r < n_rows; ++r) {
      float* row = q.query + r * d;
      load_row(p.query.data + batch * p.query.batch + query_head(r) * p.query.head + query_token(r) * p.query.token,
               p.dtype, d, row);
      for (int32_t i = 0; i < d; ++i) row[i] *= p.scale * kLog2e;
      if (!integer_keys() || plan.key.asymmetric || p.tiles == 0) continue;
      alignas(64) float parts[kMaxParts * kMaxHeadDim];
      transform.to_parts(row, parts);
      if (plan.key_mean) std::memcpy(q.rotated + r * d, parts, static_cast<size_t>(d) * 4);
      const int32_t block = plan.key.elements ? kElementQueryBlock : plan.key.scale_block;
      for (int32_t n = 0; n < plan.record.key.parts; ++n) {
        const CodePart& part = plan.record.key.part[n];
        k.quantize_query({parts + part.first, part.dims, block, plan.levels + 1, q.levels_of(n) + r});
      }
    }
  }
};

// A block's work on one partial.
struct Item : Block {
  Partial s;
  CodecCode key_code, value_code;
  MaskRows mask;
  // Of a record, known before the walk: the compiler cannot tell that kernels do not change the plan.
  size_t record_bytes, key_codes, value_scales, value_codes;
  int64_t ahead_tiles;
  bool masked;                // some score may be hidden, beside those past the end of a tile
  float negligible, notable;  // shares of a row's probability: a tile's, a token's
  int64_t met = 0, unread = 0;
  int64_t start = 0;  // of the tile to come, in the stream

  Item(const Plan& pl, const KernelTable& table, uint8_t* workspace, int64_t block, int64_t partial)
      : Block(pl, table, workspace, block),
        s(pl, workspace, block, partial),
        key_code(CodecCode::unpack(p.key_codec)),
        value_code(CodecCode::unpack(p.value_codec)),
        mask(pl.p, pl.packed),
        record_bytes(pl.record.bytes()),
        key_codes(pl.record.key_codes()),
        value_scales(pl.record.value_scales()),
        value_codes(pl.record.value_codes()),
        ahead_tiles(2 * record_bytes <= kAheadBytes ? 2 : 1),
        masked(mask.any(batch)),
        negligible(p.tiles == 0 ? 0.0F : p.sparse_values / static_cast<float>(p.tiles)),
        notable(integer_keys() ? kNotable : 0.0F) {}

  // Nothing attended to yet; `other` has seen tokens before.
  void begin(const Partial* other) const {
    for (int64_t r = 0; r < n_rows; ++r)
      s.state[r] = other == nullptr ? SoftmaxRow{-std::numeric_limits<float>::infinity(), 0.0F, 0.0F, 0.0F}
                                    : SoftmaxRow{other->state[r].max, 0.0F, other->state[r].sum, 0.0F};
    std::memset(s.out, 0, static_cast<size_t>(n_rows) * static_cast<size_t>(plan.out_width) * 4);
  }

  const uint8_t* tile(int64_t t) const { return part(t) + static_cast<size_t>(t % kPageTiles) * record_bytes; }
  static ConstTileSide section_of(const ConstTileSide& side, const CodePart& part) {
    return {side.codes + part.codes, side.scales + part.scales};
  }
  // Means lie apart from the records, so that no kernel prefetches them on its way. Inlined before GCC finds that it
  // has no effects, and drops its calls (tests/cpp/CMakeLists.txt).
  [[gnu::always_inline]] void prefetch_mean(Side side, int64_t t, int32_t dim) const {
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
            nullptr,
            nullptr};
  }

  // A tile at work: its first token in the stream, and the record that is prefetched meanwhile.
  struct Run {
    int64_t t, start;
    const uint8_t *record, *ahead;
  };
  ConstTileSide side(const uint8_t* base, size_t codes, size_t scales) const {
    return {base + codes, reinterpret_cast<const uint16_t*>(base + scales)};
  }

  // Soft cap and mask of scores. The rest of the 64 is not real.
  void hide(float* scores, int64_t row, int32_t group, const KeyRun& run) const {
    if (p.softcap > 0.0F) k.softcap(scores, group * kTile, p.softcap);
    if (!masked && run.tokens == kTile && run.kind != KeyRun::Kind::exact) return;
    for (int32_t g = 0; g < group; ++g)
      mask.apply(scores + g * kTile, batch, query_head(row + g), query_token(row + g), run);
  }

  // Scores of a group of rows against a tile, from levels first.. of the query; with `add`, added to those there are.
  void score(const Run& run, int64_t row, int32_t group, int32_t first, int32_t end, bool add, float* scores) const {
    const auto dk = static_cast<int32_t>(p.key_dim);
    const ConstTileSide key = side(run.record, key_codes, 0);
    const uint8_t* ahead = run.ahead + key_codes;
    if (plan.key.bits == 0)
      k.exact_score[static_cast<int>(key_code.dtype)][group - 1](
          {nullptr, q.query + row * dk, key, ahead, scores, dk, first, end, add});
    else
      for (int32_t n = 0; n < plan.record.key.parts; ++n) {
        const CodePart& part = plan.record.key.part[n];
        k.score[part.reader][group - 1]({q.levels_of(n) + row, q.query + row * dk, section_of(key, part),
                                         ahead + part.codes, scores, part.dims, first, end, add || n != 0});
      }
  }

  // The same with soft cap and mask. Leaves in `bias` what is to be added to all scores of a row; a soft cap has it
  // added before.
  void score(const Run& run, int64_t row, int32_t group, int32_t levels, float* scores, float* bias) const {
    score(run, row, group, 0, levels, false, scores);
    if (plan.key_mean) {
      const auto dk = static_cast<int32_t>(p.key_dim);
      MeanArgs centre = mean(Side::key, run.t, dk, group);
      centre.query = q.rotated + row * dk;
      centre.bias = bias;
      k.score_mean(centre);
      for (int32_t g = 0; p.softcap > 0.0F && g < group; ++g) {
        for (int32_t t = 0; t < kTile; ++t) scores[g * kTile + t] += bias[g];
        bias[g] = 0.0F;
      }
    }
    hide(scores, row, group, {run.start, p.counts[run.t], KeyRun::Kind::stream});
  }

  // One more level of the query for rows in which a token stands out: alone, or with the group if that is less work;
  // the other rows of the group keep their scores, and do not depend on who their neighbours are.
  void refine(const Run& run, int64_t row, int32_t group, uint32_t rows, float* scores) const {
    const bool together = (rows & (rows - 1)) != 0;
    alignas(64) float before[kMaxGroup * kTile];
    float bias[kMaxGroup];
    if (together) std::memcpy(before, scores, static_cast<size_t>(group) * kTile * sizeof(float));
    for (int32_t g = 0; g < (together ? 1 : group); ++g) {
      if (!together && (rows >> g & 1) == 0) continue;
      const int32_t n = together ? group : 1;
      // Means, masks and what is hidden stay as they are where another level is added; a soft cap does not.
      if (p.softcap > 0.0F)
        score(run, row + g, n, plan.levels + 1, scores + g * kTile, bias);
      else
        score(run, row + g, n, plan.levels, plan.levels + 1, true, scores + g * kTile);
    }
    for (int32_t g = 0; together && g < group; ++g)
      if ((rows >> g & 1) == 0) std::memcpy(scores + g * kTile, before + g * kTile, kTile * sizeof(float));
  }

  // Outputs of a group of rows += probabilities x values of a tile.
  void accumulate(const Run& run, int64_t row, int32_t group, float* probs) const {
    const auto dv = static_cast<int32_t>(p.value_dim);
    const ConstTileSide value = side(run.record, value_codes, value_scales);
    const uint8_t* ahead = run.ahead + value_codes;
    float* out = s.out + row * plan.out_width;
    if (plan.value.bits == 0) {
      const ptrdiff_t stride = static_cast<ptrdiff_t>(dv) * dtype_bytes(value_code.dtype);
      k.dense_accumulate[static_cast<int>(value_code.dtype)](
          {value.codes, stride, nullptr, probs, ahead, out, plan.out_width, dv, kTile, group});
    } else {
      for (int32_t n = 0; n < plan.record.value.parts; ++n) {
        const CodePart& part = plan.record.value.part[n];
        k.accumulate[part.reader][group - 1]({probs, section_of(value, part), ahead + part.codes, out + part.first,
                                              plan.out_width, part.dims, plan.levels,
                                              static_cast<int32_t>(run.t * 5 % kTile)});
      }
    }
  }

  // The mean of the values of tile t, for the probability that is pending.
  void add_mean(int64_t t) const {
    for (int64_t row = 0; row < n_rows; row += kMaxGroup) {
      const auto group = static_cast<int32_t>(n_rows - row < kMaxGroup ? n_rows - row : kMaxGroup);
      MeanArgs centre = mean(Side::value, t, static_cast<int32_t>(p.value_dim), group);
      centre.stride = plan.out_width;
      centre.rows = s.state + row;
      centre.out = s.out + row * plan.out_width;
      k.accumulate_mean(centre);
    }
  }

  // Before tiles(), of which the first is `begin`.
  void enter(int64_t begin) {
    for (int64_t r = 0; r < n_rows; ++r) s.state[r].pending = 0.0F;  // exact tokens have no mean
    for (int64_t t = 0; t < begin; ++t) start += p.counts[t];
  }
  // Tiles in order, in one or several calls. What comes after them, for prefetches: tiles from then_begin on, of
  // `then`.
  void tiles(int64_t begin, int64_t end, const Item& then, int64_t then_begin) {
    alignas(64) float scores[kMaxGroup * kTile];
    float bias[kMaxGroup] = {};
    for (int64_t t = begin; t < end; ++t) {
      const bool within = t + ahead_tiles < end;
      const Item& later = within ? *this : then;
      const int64_t beyond = std::min(t + ahead_tiles - end, t - begin);  // of a single tile, the first
      const int64_t next = within ? t + ahead_tiles : std::min(then_begin + beyond, p.tiles - 1);
      const uint8_t *record = tile(t), *coming = later.tile(next);
      if (plan.key_mean) later.prefetch_mean(Side::key, next, static_cast<int32_t>(p.key_dim));
      if (plan.value_mean) later.prefetch_mean(Side::value, next, static_cast<int32_t>(p.value_dim));
      for (int64_t row = 0; row < n_rows; row += kMaxGroup) {
        const auto group = static_cast<int32_t>(n_rows - row < kMaxGroup ? n_rows - row : kMaxGroup);
        // The first group of rows brings the tile from memory, the others find it in the cache.
        const Run run{t, start, record, row == 0 ? coming : record};
        // Scales, ahead of the codes that the kernels prefetch: memory is read in order. Into L1 on all levels.
        for (size_t at = 0; at < key_codes; at += kLine) __builtin_prefetch(run.ahead + at);
        score(run, row, group, plan.levels, scores, bias);
        SoftmaxArgs args{scores, bias,           s.state + row, s.out + row * plan.out_width,
                         group,  plan.out_width, negligible,    notable};
        SoftmaxResult found = k.softmax(args);
        if (found.notable != 0) {
          refine(run, row, group, found.notable, scores);
          args.notable = 0.0F;
          found = k.softmax(args);
        }
        ++met;
        if (found.negligible)
          ++unread;
        else
          accumulate(run, row, group, scores);
      }
      if (plan.value_mean && (t + 1 == end || plan.record.value.mean_of(t) != plan.record.value.mean_of(t + 1)))
        add_mean(t);
      start += p.counts[t];
    }
  }

  // Sinks or exact tokens, blocks of 64 rows of elements.
  void dense(const Strided& keys, const Strided& values, int64_t tokens, int64_t start, KeyRun::Kind kind) const {
    alignas(64) float scores[kMaxGroup * kTile];
    constexpr float bias[kMaxGroup] = {};
    const auto dk = static_cast<int32_t>(p.key_dim), dv = static_cast<int32_t>(p.value_dim);
    const int type = static_cast<int>(p.dtype);
    for (int64_t t = 0; t < tokens; t += kTile) {
      const auto n = static_cast<int32_t>(tokens - t < kTile ? tokens - t : kTile);
      const uint8_t* key = keys.data + batch * keys.batch + head * keys.head + t * keys.token;
      const uint8_t* value = values.data + batch * values.batch + head * values.head + t * values.token;
      for (int64_t row = 0; row < n_rows; row += kMaxGroup) {
        const auto group = static_cast<int32_t>(n_rows - row < kMaxGroup ? n_rows - row : kMaxGroup);
        k.dense_score[type]({key, keys.token, q.query + row * dk, scores, nullptr, nullptr, 0, dk, n, group});
        hide(scores, row, group, {start + t, n, kind});
        float* out = s.out + row * plan.out_width;
        const SoftmaxArgs args{scores, bias, s.state + row, out, group, plan.out_width, 0.0F, 0.0F};
        if (k.softmax(args).negligible) continue;  // all masked
        out += plan.out_width - dv;
        k.dense_accumulate[type]({value, values.token, nullptr, scores, nullptr, out, plan.out_width, dv, n, group});
      }
    }
  }

  void exact() const {
    dense(p.sink_keys, p.sink_values, p.sinks, 0, KeyRun::Kind::sinks);
    dense(p.keys, p.values, p.exact, plan.packed, KeyRun::Kind::exact);
  }

  void count() const {
    if (p.unread == nullptr) return;
    p.unread[0].fetch_add(met, std::memory_order_relaxed);
    p.unread[1].fetch_add(unread, std::memory_order_relaxed);
  }
};

}  // namespace kvpack
