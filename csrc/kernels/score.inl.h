// score: integer dot products of a group of query rows with the 64 keys of a tile.
//
// The accumulators are lanes = tokens, so there are no horizontal sums: for every unit, each level vector (16 tokens
// x 4 dims on 512 bits) meets the broadcast dword of 4 query bytes of every row. A scale block ends with one
// conversion, one multiplication by the token scales and one by the row's scale.
//
// Overflow: |acc| <= 256 dims * 255 * 127 = 8.3e6 < 2^31.
#pragma once
#include "kernels/blocking.inl.h"
#include "kernels/table.h"
#include "kernels/unpack.inl.h"

namespace {

// Scale block `sb` of a query row, from dim `at` on -> levels of int8: q ~ scale0 * level0 + scale1 * level1, scale1 =
// scale0 / 254.
template <class S>
void quantize_query_block(const float* q, int dims, int levels, int sb, int at, kvpack::QueryRow& row) {
  using namespace kvpack;
  using F = typename S::F;
  alignas(64) uint8_t level[2][kMaxHeadDim];
  F top = S::zero();
  for (int i = 0; i < dims; i += S::kLanes) top = S::max(top, S::abs(S::load(q + i)));
  const float max = S::reduce_max(top), step = max / 127.0F;
  const F inv = S::set1(max > 0.0F ? 127.0F / max : 0.0F);
  F sum[2] = {S::zero(), S::zero()};
  for (int i = 0; i < dims; i += S::kLanes) {
    const F v = S::mul(S::load(q + i), inv), first = S::round_even(v);
    S::store_low_bytes(level[0] + i, first);
    sum[0] = S::add(sum[0], first);
    if (levels == 1) continue;
    const F second = S::round_even(S::mul(S::sub(v, first), S::set1(254.0F)));
    S::store_low_bytes(level[1] + i, second);
    sum[1] = S::add(sum[1], second);
  }
  for (int n = 0; n < levels; ++n) {
    for (int i = 0; i < dims; i += 4)
      S::template pack_operand<Side::key>(level[n] + i, row.operand[n] + (at + i) / 4 * S::kOperandDwords);
    row.scale[n][sb] = n == 0 ? step : step / 254.0F;
    row.offset[n][sb] = -S::kKeyOffset * static_cast<int>(S::reduce_add(sum[n]));
  }
}

template <class S>
void quantize_query(const kvpack::QuantizeQueryArgs& a) {
  const int block = a.scale_block == 0 ? a.head_dim : a.scale_block;
  for (int sb = 0; sb * block < a.head_dim; ++sb) {
    const int left = a.head_dim - sb * block;
    quantize_query_block<S>(a.query + sb * block, left < block ? left : block, 2, sb, sb * block, *a.row);
  }
}

// The query row of each group of 32 asymmetric keys: q times half the steps of the channels. Returns in `bias` what the
// middles of the channels add to every score of the group.
template <class S, class Codec>
void quantize_asymmetric_query(const kvpack::ScoreArgs& a, const float* query, kvpack::QueryRow* rows, float* bias) {
  using namespace kvpack;
  using F = typename S::F;
  alignas(64) float scaled[kMaxHeadDim];
  for (int n = 0; n < kKeyGroups; ++n) {
    const uint16_t* steps = a.tile.scales + n * a.head_dim;
    const uint16_t* zeros = steps + kKeyGroups * a.head_dim;
    F sum = S::zero();
    for (int i = 0; i < a.head_dim; i += S::kLanes) {
      const F q = S::load(query + i), step = load_scales<S>(steps + i);
      S::store(scaled + i, S::mul(S::mul(q, step), S::set1(0.5F)));
      sum = S::fma(q, S::fma(step, S::set1(Codec::kMiddle), load_scales<S>(zeros + i)), sum);
    }
    bias[n] = S::reduce_add(sum);
    quantize_query_block<S>(scaled, a.head_dim, a.levels, 0, 0, rows[n]);
  }
}

template <class S, class Codec, int G>
void score(const kvpack::ScoreArgs& a) {
  using namespace kvpack;
  using I = typename S::I;
  constexpr int kPerBlock = 16 / S::kLanes, kVectors = 4 * kPerBlock, kFit = vectors_in_flight<S>(G);
  // Vectors in flight share a query row: that of their group, where keys are asymmetric.
  constexpr int kPerRow = Codec::kAsymmetric ? kVectors / kKeyGroups : kVectors;
  constexpr int kInFlight = kFit < kPerRow ? kFit : kPerRow;
  using U = Unpacker<S, Codec, Side::key>;
  const U unpack;
  constexpr int kDwords = U::kDwords, kLines = U::kLines;
  constexpr int kSharers = unit_sharers(Codec::kBits);
  const int blocks = Codec::kAsymmetric ? 1 : scale_blocks(Codec::kScaleBlock, Codec::kBits, a.head_dim);
  [[maybe_unused]] QueryRow own[Codec::kAsymmetric ? G : 1][kKeyGroups];
  [[maybe_unused]] float bias[G][kKeyGroups];
  if constexpr (Codec::kAsymmetric)
    for (int g = 0; g < G; ++g) quantize_asymmetric_query<S, Codec>(a, a.query + g * a.head_dim, own[g], bias[g]);
  const CodeGrid grid{Codec::kBits, kTile, a.head_dim};
  const int parts = grid.parts();
  const int units = blocks == 1 ? grid.units() : Codec::kScaleBlock / (4 * kDwords);  // of a scale block
  const uint8_t* ahead = a.ahead;
  for (int level = 0; level < a.levels; ++level) {
    for (int v0 = 0; v0 < kVectors; v0 += kInFlight) {
      [[maybe_unused]] const int key_group = v0 / kPerRow;
      const auto row = [&](int g) __attribute__((always_inline))->const QueryRow& {
        if constexpr (Codec::kAsymmetric) return own[g][key_group];
        return a.rows[g];
      };
      for (int sb = 0; sb < blocks; ++sb) {
        I acc[G][kInFlight];
        for (int g = 0; g < G; ++g)
          for (int v = 0; v < kInFlight; ++v) acc[g][v] = S::splat(row(g).offset[level][sb]);
        const auto lane = [&](int u, int v) {
          const int at = v0 + v;
          return a.tile.codes + (static_cast<size_t>(u) * 4 + static_cast<size_t>(at / kPerBlock)) * kLines * kLine +
                 at % kPerBlock * 4 * S::kLanes;
        };
        const auto shared_lane = [&](int part, int v) {
          const int at = v0 + v;
          return a.tile.codes + grid.shared_line(0, part, at / kPerBlock) + at % kPerBlock * 4 * S::kLanes;
        };
        // Known to the compiler where all lane blocks that share a unit are in flight.
        const auto share = [&](int v) {
          return (kInFlight % (kSharers * kPerBlock) == 0 ? v : v0 + v) / kPerBlock % kSharers;
        };
        const auto meet = [&](int v, int dword, I levels) __attribute__((always_inline)) {
          const typename S::Code code = S::expand(levels);
          const int operand = dword * S::kOperandDwords;
          unrolled<G>([&](int g) __attribute__((always_inline)) {
            acc[g][v] = S::template dot<Side::key>(acc[g][v], code, row(g).operand[level] + operand);
          });
        };
        const int end = (sb + 1) * units < grid.units() ? (sb + 1) * units : grid.units();
        typename U::Carry carry[kInFlight];
        const int last = end > 0 ? end - 1 : 0;  // 16 dims of 3 bits are less than a unit: there is none to read
        for (int v = 0; v < kInFlight; ++v)
          carry[v] = kDwords >= 8 && parts != 0
                         ? unpack.start_shared(lane(last, v), shared_lane(parts - 1, v), share(v))
                         : unpack.start(lane(last, v));
#pragma GCC unroll 1
        for (int u = sb * units; u < end; ++u) {
          unrolled<kInFlight>([&](int v) __attribute__((always_inline)) {
            const uint8_t* p = lane(u, v);
            if (level == 0 && (v0 + v) % kPerBlock == 0)
              for (int n = 0; n < kLines; ++n) S::prefetch(ahead + (p - a.tile.codes) + n * kLine);
            unpack(
                p, carry[v], [&](int j, I levels) __attribute__((always_inline)) { meet(v, u * kDwords + j, levels); });
          });
        }
        if constexpr (kDwords >= 8)  // units that lane blocks share, the last ones: each meets its own share
          for (int part = 0; part < (sb == blocks - 1 ? parts : 0); ++part)
            unrolled<kInFlight>([&](int v) __attribute__((always_inline)) {
              const uint8_t* p = shared_lane(part, v);
              if (level == 0 && (v0 + v) % (kSharers * kPerBlock) == 0)
                for (int n = 0; n < kLines; ++n) S::prefetch(ahead + (p - a.tile.codes) + n * kLine);
              unpack.shared(
                  p, share(v), carry[v], [&](int j, I levels) __attribute__((always_inline)) {
                    meet(v, end * kDwords + part * 4 + j, levels);
                  });
            });
        for (int v = 0; v < kInFlight; ++v) {
          const int token = (v0 + v) * S::kLanes;
          [[maybe_unused]] auto scale = S::zero();
          if constexpr (!Codec::kAsymmetric) scale = load_scales<S>(a.tile.scales + sb * kTile + token);
          for (int g = 0; g < G; ++g) {
            float* out = a.scores + g * kTile + token;
            const auto sum = S::to_float(acc[g][v]), unit = S::set1(row(g).scale[level][sb]);
            if constexpr (Codec::kAsymmetric) {
              S::store(out, S::fma(sum, unit, level == 0 ? S::set1(bias[g][key_group]) : S::load(out)));
            } else {
              const auto part = S::mul(S::mul(sum, scale), unit);
              S::store(out, level == 0 && sb == 0 && !a.add ? part : S::add(S::load(out), part));
            }
          }
        }
      }
    }
  }
}

// Keys that are elements, dim major: every element vector (16 tokens of one dim) meets the broadcast query element of
// each row. Those of e4m3 have token scales.
template <class S, kvpack::Dtype T, int G>
void exact_score(const kvpack::ScoreArgs& a) {
  using namespace kvpack;
  using F = typename S::F;
  constexpr int kInFlight = vectors_in_flight<S>(G), kVectors = kTile / S::kLanes, kBytes = dtype_bytes(T);
  for (int v0 = 0; v0 < kVectors; v0 += kInFlight) {
    F acc[G][kInFlight];
    for (int g = 0; g < G; ++g)
      for (int v = 0; v < kInFlight; ++v) acc[g][v] = S::zero();
#pragma GCC unroll 2
    for (int dim = 0; dim < a.head_dim; ++dim) {
      const ptrdiff_t at = (static_cast<ptrdiff_t>(dim) * kTile + v0 * S::kLanes) * kBytes;
      const uint8_t* p = a.tile.codes + at;
      F key[kInFlight];
      for (int v = 0; v < kInFlight; ++v) key[v] = S::template load_element<T>(p + v * S::kLanes * kBytes);
      for (int n = 0; n < kInFlight * S::kLanes * kBytes; n += kLine) S::prefetch(a.ahead + at + n);
      unrolled<G>([&](int g) __attribute__((always_inline)) {
        const F q = S::set1(a.query[g * a.head_dim + dim]);
        unrolled<kInFlight>([&](int v) __attribute__((always_inline)) { acc[g][v] = S::fma(key[v], q, acc[g][v]); });
      });
    }
    for (int v = 0; v < kInFlight; ++v) {
      const int token = (v0 + v) * S::kLanes;
      F scale = S::set1(1.0F);
      if constexpr (T == Dtype::e4m3) scale = S::mul(load_scales<S>(a.tile.scales + token), S::set1(kE4m3Unit));
      for (int g = 0; g < G; ++g)
        S::store(a.scores + g * kTile + token, T == Dtype::e4m3 ? S::mul(acc[g][v], scale) : acc[g][v]);
    }
  }
}

}  // namespace
