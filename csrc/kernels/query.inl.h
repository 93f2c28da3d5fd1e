// Queries as levels of int8: of whole rows, before the walk over tiles, and for groups of asymmetric keys, which have
// steps of their own for every channel (docs/format.md).
#pragma once
#include "kernels/blocking.inl.h"
#include "kernels/levels.inl.h"
#include "kernels/table.h"

namespace {

// Of a level, for the one after it.
constexpr float kFiner = 254.0F;

// The scale of the first level, and what values are multiplied with, from the largest size of a value: of a row, or of
// four.
template <class T>
inline T query_step(T max) {
  return max * (1.0F / 127.0F);
}
// Those of less than 2^-100 count as 0: from 127 / 2^128 on, it would be infinite.
template <class T>
inline T query_inverse(T max) {
  return max > 0x1p-100F ? 127.0F / max : T{};
}

template <class S>
void quantize_query(const kvpack::QuantizeQueryArgs& a) {
  using namespace kvpack;
  using F = typename S::F;
  const int block = a.scale_block == 0 ? a.head_dim : a.scale_block;
  for (int sb = 0; sb * block < a.head_dim; ++sb) {
    const int left = a.head_dim - sb * block, dims = left < block ? left : block;
    const float* q = a.query + sb * block;
    F top = S::zero(), sum[kQueryLevels];
    for (int i = 0; i < dims; i += S::kLanes) top = S::max(top, S::abs(S::load(q + i)));
    const float max = S::reduce_max(top);
    const F inverse = S::set1(query_inverse(max));
    for (int n = 0; n < a.levels; ++n) sum[n] = S::zero();
    for (int i = 0; i < dims; i += S::kLanes) {
      F v = S::mul(S::load(q + i), inverse);
      for (int n = 0; n < a.levels; ++n) {
        const F level = S::round_even(v);
        S::store_operand(a.row->operand[n], sb * block + i, level);
        sum[n] = S::add(sum[n], level);
        v = S::mul(S::sub(v, level), S::set1(kFiner));
      }
    }
    float step = query_step(max);
    for (int n = 0; n < a.levels; ++n, step /= kFiner) {
      const float total = S::reduce_add(sum[n]);  // NaN where some value is: so is the scale then
      const bool sound = total == total;
      a.row->scale[n][sb] = sound ? step : total;
      a.row->offset[n][sb] = kSumsQueries<S> && sound ? -128 * static_cast<int>(total) : 0;
    }
  }
}

// The query rows of each group of 32 asymmetric keys: q times half the steps of the channels, with a scale per 32 of
// them, as their sizes differ.
template <int G>
struct AsymmetricRows {
  static constexpr int kBlock = 32, kDwords = kBlock / 4;
  static constexpr int kRows = G + G % 2;  // they are stored in pairs
  alignas(64) int32_t operand[kvpack::kQueryLevels][kvpack::kKeyGroups][kvpack::kMaxScaleBlocks][kRows][kDwords];
  float scale[kvpack::kQueryLevels][kvpack::kKeyGroups][kvpack::kMaxScaleBlocks][4];
  // What a level adds to every score of the group: minus the offset of the levels of keys times the sum of its own, in
  // units of the scores, and in the first, q times the middles of the channels.
  float bias[kvpack::kQueryLevels][kvpack::kKeyGroups][4];
};

// In three loops, of products and their largest, of divisions, and of levels: each waits for reductions that those of
// the next blocks overlap with; rows lie side by side for the same reason. The first loop calls meanwhile(step), a step
// for each block of each group.
//
// Measured (Zen 5, kivi4, 4 rows of 128): 1.5 ns per token, of 3.1 for its scores.
template <class S, class Codec, int G, class Meanwhile>
[[gnu::always_inline]] inline void quantize_asymmetric_queries(const kvpack::ScoreArgs& a, AsymmetricRows<G>& rows,
                                                               Meanwhile meanwhile) {
  using namespace kvpack;
  using F = typename S::F;
  using Rows = AsymmetricRows<G>;
  constexpr int kBlock = Rows::kBlock, kVectors = kBlock / S::kLanes;
  constexpr float kOffset = static_cast<float>(level_offset<S, Codec, Side::key>());
  static_assert(Codec::kScaleBlock == kBlock);
  const int blocks = (a.head_dim + kBlock - 1) / kBlock;
  alignas(64) float scaled[kKeyGroups][kMaxScaleBlocks][G][kBlock];
  float max[kKeyGroups][kMaxScaleBlocks][4], inverse[kKeyGroups][kMaxScaleBlocks][4];
  F middles[kKeyGroups][4];
  const auto multiply = [&](int n, int sb, int vectors) __attribute__((always_inline)) {
    meanwhile(n * blocks + sb);
    const uint16_t* steps = a.tile.scales + n * a.head_dim + sb * kBlock;
    const uint16_t* zeros = steps + kKeyGroups * a.head_dim;
    F top[4];
    for (int g = 0; g < 4; ++g) top[g] = S::zero();
    for (int i = 0; i < vectors; ++i) {
      const int at = i * S::kLanes;
      const F step = load_scales<S>(steps + at), half = S::mul(step, S::set1(0.5F));
      const F middle = S::fma(step, S::set1(Codec::kMiddle), load_scales<S>(zeros + at));
      unrolled<G>([&](int g) __attribute__((always_inline)) {
        const F q = S::load(a.query + g * a.head_dim + sb * kBlock + at), v = S::mul(q, half);
        S::store(scaled[n][sb][g] + at, v);
        top[g] = S::max_size(top[g], v);
        middles[n][g] = S::fma(q, middle, middles[n][g]);
      });
    }
    for (int i = vectors; i < kVectors; ++i)  // dims that there are not
      for (int g = 0; g < G; ++g) S::store(scaled[n][sb][g] + i * S::kLanes, S::zero());
    S::reduce_max_4(top[0], top[1], top[2], top[3], max[n][sb]);
  };
  for (int n = 0; n < kKeyGroups; ++n) {
    for (int g = 0; g < 4; ++g) middles[n][g] = S::zero();
    for (int sb = 0; sb < a.head_dim / kBlock; ++sb) multiply(n, sb, kVectors);
    if (a.head_dim % kBlock != 0) multiply(n, blocks - 1, a.head_dim % kBlock / S::kLanes);
  }
  for (int n = 0; n < kKeyGroups; ++n)
    for (int sb = 0; sb < blocks; ++sb) {
      store_4(inverse[n][sb], query_inverse(load_4(max[n][sb])));
      Four step = query_step(load_4(max[n][sb]));
      for (int l = 0; l < a.levels; ++l, step /= kFiner) store_4(rows.scale[l][n][sb], step);
    }
  // Levels of two rows of a block; `sum` of each adds up to the bias.
  const auto quantize_pair = [&]<int First>(std::integral_constant<int, First>, int n, int sb, int levels,
                                            F(&sum)[kQueryLevels][4]) __attribute__((always_inline)) {
    F v[2 * kVectors], level[2 * kVectors];
    unrolled<2>([&](auto half) __attribute__((always_inline)) {
      constexpr int g = First + half;
      for (int i = 0; i < kVectors; ++i) {
        if constexpr (g < G)
          v[half * kVectors + i] = S::mul(S::load(scaled[n][sb][g] + i * S::kLanes), S::set1(inverse[n][sb][g]));
        else
          v[half * kVectors + i] = S::zero();
      }
    });
    for (int l = 0; l < levels; ++l) {
      unrolled<2>([&](auto half) __attribute__((always_inline)) {
        constexpr int g = First + half;
        const F offset = S::set1(-kOffset * rows.scale[l][n][sb][g]);
        for (int i = half * kVectors; i < (half + 1) * kVectors; ++i) {
          level[i] = S::round_even(v[i]);
          if constexpr (kOffset != 0.0F) sum[l][g] = S::fma(level[i], offset, sum[l][g]);
          if (levels > 1) v[i] = S::mul(S::sub(v[i], level[i]), S::set1(kFiner));
        }
      });
      S::template store_tile<true>(rows.operand[l][n][sb][First], level);
    }
  };
  const auto quantize = [&](int levels) __attribute__((always_inline)) {
    for (int n = 0; n < kKeyGroups; ++n) {
      F sum[kQueryLevels][4];
      for (int g = 0; g < 4; ++g) sum[0][g] = middles[n][g];
      for (int l = 1; l < levels; ++l)
        for (int g = 0; g < 4; ++g) sum[l][g] = S::zero();
      for (int sb = 0; sb < blocks; ++sb)
        unrolled<Rows::kRows / 2>([&](auto pair) __attribute__((always_inline)) {
          quantize_pair(std::integral_constant<int, 2 * pair>{}, n, sb, levels, sum);
        });
      for (int l = 0; l < levels; ++l) S::reduce_add_4(sum[l][0], sum[l][1], sum[l][2], sum[l][3], rows.bias[l][n]);
    }
  };
  if (a.levels == 1)  // a number that the compiler knows
    quantize(1);
  else
    quantize(a.levels);
}

}  // namespace
