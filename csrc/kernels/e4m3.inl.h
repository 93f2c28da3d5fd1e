// Tiles of e4m3 codes in integers, on levels that look up 128 bytes at once: every code is a number in fixed point, of
// two bytes, and both meet the query or the probability as levels of 8 bits do. Products of floats would take twice as
// long (fp8 on AVX-512: 24.8 against 14 ns per token, hot).
//
//   value = (256 * high + low) * 2^-6, both from a table by the size of the code, both negated where its sign is set
//
// Sizes of 1/8 and more are exact (448 is 28672 steps), but where `low` would be -128, which has no negative: those are
// one step off. Smaller ones are rounded to a step, a 28672nd of the largest. Precision "high" multiplies floats,
// and so do scores that are made anew with another level of the query, under a soft cap.
//
// Codes lie as elements: rows of 64 tokens (keys) or of dims (values). Four rows are interleaved into four vectors, as
// the products want them; their lanes are out of order, and sums are put in order at the end.
//
// Overflow: sums of one plane as in score.inl.h and accumulate.inl.h; they are joined as floats.
#pragma once
#include "kernels/accumulate.inl.h"
#include "kernels/dense.inl.h"
#include "kernels/score.inl.h"

namespace {

template <class S>
concept InterleavesRows = requires {
  S::kInterleaves;
};

template <class S, kvpack::Side Sd>
struct FixedPoint {
  static constexpr float kStep = 0x1p-6F;
  static constexpr int kOffset = Sd == kvpack::Side::key ? S::kKeyOffset : S::kValueOffset;
  struct Tables {
    alignas(64) int8_t high[128], low[128];
    constexpr Tables() : high{}, low{} {
      for (int code = 0; code < 128; ++code) {
        const int size = code < 8 ? code : (8 + code % 8) << (code / 8 - 1);  // in steps of 2^-9
        const int steps = (size + 4) >> 3, top = (steps + 128) >> 8, rest = steps - 256 * top;
        high[code] = static_cast<int8_t>(top + kOffset);
        low[code] = static_cast<int8_t>((rest == -128 ? -127 : rest) + kOffset);
      }
    }
  };
  static constexpr Tables kTables{};
  typename S::Table128 high = S::load_table_128(kTables.high), low = S::load_table_128(kTables.low);

  // Sums of two vectors of interleaved rows, by plane, row of the group and vector.
  template <int G>
  struct Sums {
    typename S::I plane[2][G][2];
    // Four codes of every lane of half the vectors of four rows, times an operand per row of the group.
    template <int Half>
    [[gnu::always_inline]] void meet(const FixedPoint& f, const typename S::I (&row)[4], const int32_t* operand,
                                     int stride) {
      typename S::I code[2];
      S::template interleave<Half>(row, code);
      unrolled<2>([&](int v) __attribute__((always_inline)) {
        const typename S::I levels[2] = {S::template negate_where<7>(S::look_up_128(f.high, code[v]), code[v]),
                                         S::template negate_where<7>(S::look_up_128(f.low, code[v]), code[v])};
        unrolled<2 * G>([&](int i) __attribute__((always_inline)) {
          const int g = i / 2, n = i % 2;
          plane[n][g][v] = S::template dot<Sd>(plane[n][g][v], S::expand(levels[n]), operand + g * stride);
        });
      });
    }
    [[gnu::always_inline]] typename S::F joined(int g, int v) const {
      return S::fma(S::to_float(plane[0][g][v]), S::set1(256.0F), S::to_float(plane[1][g][v]));
    }
  };
};

// Keys of e4m3. The first level of the query, or a further one to be added.
template <class S, int G>
void score_fixed_point(const kvpack::ScoreArgs& a) {
  using namespace kvpack;
  using F = typename S::F;
  using Fixed = FixedPoint<S, Side::key>;
  static_assert(S::kLanes == 16);
  constexpr int kRowDwords = static_cast<int>(sizeof(QueryRow) / 4);
  const Fixed fixed;
  const int level = a.first;
  const int32_t *operands = a.rows->operand[level], *offsets = a.rows->offset[level];
  const float* units = a.rows->scale[level];
  alignas(64) float sums[G][kTile];
  unrolled<2>([&](auto half) __attribute__((always_inline)) {
    for (int first = 0, sb = 0; first < a.head_dim; first += kElementQueryBlock, ++sb) {
      const int end = first + kElementQueryBlock < a.head_dim ? first + kElementQueryBlock : a.head_dim;
      typename Fixed::template Sums<G> acc;
      unrolled<4 * G>([&](int i) __attribute__((always_inline)) {
        acc.plane[i / 2 % 2][i / 4][i % 2] = S::splat(offsets[i / 4 * kRowDwords + sb]);
      });
#pragma GCC unroll 1
      for (int dim = first; dim < end; dim += 4) {
        const int at = dim * kTile;
        typename S::I row[4];
        for (int n = 0; n < 4; ++n) {
          row[n] = S::load_bytes(a.tile.codes + at + n * kTile);
          if (half == 0) S::prefetch(a.ahead + at + n * kTile);
        }
        acc.template meet<half>(fixed, row, operands + dim / 4, kRowDwords);
      }
      unrolled<2 * G>([&](int i) __attribute__((always_inline)) {
        const int g = i / 2, v = i % 2;
        const F unit = S::set1(units[g * kRowDwords + sb]), sum = acc.joined(g, v);
        float* out = sums[g] + (2 * half + v) * S::kLanes;
        S::store(out, sb == 0 ? S::mul(sum, unit) : S::fma(sum, unit, S::load(out)));
      });
    }
  });
  for (int g = 0; g < G; ++g) {
    F sum[4];
    for (int v = 0; v < 4; ++v) sum[v] = S::load(sums[g] + v * S::kLanes);
    S::restore_order(sum);
    for (int v = 0; v < 4; ++v) {
      const F scale = S::mul(load_scales<S>(a.tile.scales + v * S::kLanes), S::set1(Fixed::kStep));
      float* out = a.scores + g * kTile + v * S::kLanes;
      S::store(out, a.add ? S::fma(sum[v], scale, S::load(out)) : S::mul(sum[v], scale));
    }
  }
}

template <class S, int G>
void accumulate_fixed_point(const kvpack::AccumulateArgs& a) {
  using namespace kvpack;
  using F = typename S::F;
  using Fixed = FixedPoint<S, Side::value>;
  static_assert(S::kLanes == 16 && S::kValueOffset == 0);
  const Fixed fixed;
  Weights<1, G, false> weights;
  quantize_probs<S, 128>(a.probs, a.tile.scales, a.dither, 1, weights);
  for (int first = 0; first < a.head_dim; first += 64) {
    const int dims = a.head_dim - first < 64 ? a.head_dim - first : 64;
    alignas(64) float sums[G][64];
    unrolled<2>([&](auto half) __attribute__((always_inline)) {
      typename Fixed::template Sums<G> acc;
      const int32_t* operand = unknown(weights.operand[0][0][0]);
      unrolled<4 * G>([&](int i) __attribute__((always_inline)) { acc.plane[i / 2 % 2][i / 4][i % 2] = S::splat(0); });
#pragma GCC unroll 1
      for (int t = 0; t < kTile; t += 4) {
        typename S::I row[4];
        for (int n = 0; n < 4; ++n) {
          const ptrdiff_t at = static_cast<ptrdiff_t>(t + n) * a.head_dim + first;
          row[n] = S::load_first_bytes(a.tile.codes + at, dims);
          if (half == 0) S::prefetch(a.ahead + at);
        }
        acc.template meet<half>(fixed, row, operand + t / 4, kTile / 4);
      }
      unrolled<2 * G>([&](int i) __attribute__((always_inline)) {
        S::store(sums[i / 2] + (2 * half + i % 2) * S::kLanes, acc.joined(i / 2, i % 2));
      });
    });
    for (int g = 0; g < G; ++g) {
      F sum[4];
      for (int v = 0; v < 4; ++v) sum[v] = S::load(sums[g] + v * S::kLanes);
      S::restore_order(sum);
      const F unit = S::set1(weights.worth[0][g] * Fixed::kStep);
      float* out = a.out + static_cast<ptrdiff_t>(g) * a.out_stride + first;
      unrolled<4>([&](int v) __attribute__((always_inline)) {
        if (v * S::kLanes < dims) S::store(out + v * S::kLanes, S::fma(sum[v], unit, S::load(out + v * S::kLanes)));
      });
    }
  }
}

template <class S, int G>
void score_e4m3(const kvpack::ScoreArgs& a) {
  const bool exact = a.first == 0 && a.levels > 1;
  if constexpr (InterleavesRows<S>) {
    if (!exact && a.first < 2) return score_fixed_point<S, G>(a);
  }
  // Scores of floats are not made better by more levels.
  if (a.first == 0) exact_score<S, kvpack::Dtype::e4m3, G>(a);
}

template <class S, int G>
void accumulate_e4m3(const kvpack::AccumulateArgs& a) {
  if constexpr (InterleavesRows<S>) {
    if (a.levels == 1) return accumulate_fixed_point<S, G>(a);
  }
  accumulate_floats<S, G>(a);
}

}  // namespace
