// score: integer dot products of a group of query rows with the 64 keys of a tile.
//
// The accumulators are lanes = tokens, so there are no horizontal sums: for every unit, each level vector (16 tokens
// x 4 dims on 512 bits) meets the broadcast dword of 4 query bytes of every row. A scale block ends with one
// conversion, one multiplication by the token scales and one by the row's scale.
//
// Overflow: |acc| <= 256 dims * 255 * 127 = 8.3e6 < 2^31.
#pragma once
#include "kernels/blocking.inl.h"
#include "kernels/query.inl.h"
#include "kernels/table.h"
#include "kernels/unpack.inl.h"

namespace {

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
  constexpr int kSharers = unit_sharers(Codec::kBits), kUnit = level_unit<S, Codec, Side::key>();
  static_assert(!Codec::kAsymmetric || kUnit == 1);  // it goes into the scales of tokens
  constexpr int kRowDwords = Codec::kAsymmetric ? AsymmetricRows<G>::kDwords : static_cast<int>(sizeof(QueryRow) / 4);
  const int blocks = scale_blocks(Codec::kScaleBlock, Codec::kBits, a.head_dim);
  const CodeGrid grid{Codec::kBits, kTile, a.head_dim};
  [[maybe_unused]] AsymmetricRows<Codec::kAsymmetric ? G : 1> own;
  // Of the lines to come, those of the first group of keys are prefetched meanwhile: prefetches that come in a burst
  // wait for each other (Zen 5, kivi4: 12 % of the time of attention over cold tiles). Of head sizes that are no
  // multiple of a block, a few of the values' lines too.
  if constexpr (Codec::kAsymmetric)
    quantize_asymmetric_queries<S, Codec, G>(
        a, own, [&](int step) __attribute__((always_inline)) {
          constexpr int kShare = Codec::kScaleBlock / (4 * kDwords) / kKeyGroups;  // units of a step
          static_assert(kShare > 0);
          if (a.first != 0) return;
          for (int u = step * kShare; u < (step + 1) * kShare; ++u)
            for (int n = 0; n < 4 / kKeyGroups * kLines; ++n) S::prefetch(a.ahead + (u * 4 * kLines + n) * kLine);
        });
  const int parts = grid.parts();
  const int units = blocks == 1 ? grid.units() : Codec::kScaleBlock / (4 * kDwords);  // of a scale block
  const uint8_t* ahead = a.ahead;
  for (int level = a.first; level < a.levels; ++level) {
    for (int v0 = 0; v0 < kVectors; v0 += kInFlight) {
      [[maybe_unused]] const int key_group = v0 / kPerRow;
      for (int sb = 0; sb < blocks; ++sb) {
        // operands[n] is dword n of the first row, of the whole row; those of the others are kRowDwords apart.
        const int32_t* operands;
        if constexpr (Codec::kAsymmetric)
          operands = own.operand[level][key_group][sb][0] - sb * kRowDwords;
        else
          operands = a.rows->operand[level];
        Sums<S, Codec, Side::key, G, kInFlight, kDwords> sums;
        for (int g = 0; g < G; ++g)
          for (int v = 0; v < kInFlight; ++v)
            sums.acc[g][v] = S::splat(Codec::kAsymmetric ? 0 : key_begin<S, Codec>(a.rows[g].offset[level][sb]));
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
        const auto meet = [&](int v, auto j, int dword, I levels) __attribute__((always_inline)) {
          const typename S::Code code = S::expand(levels);
          unrolled<G>([&](int g) __attribute__((always_inline)) {
            sums.meet(j, g, v, code, operands + g * kRowDwords + dword);
          });
        };
        const int end = (sb + 1) * units < grid.units() ? (sb + 1) * units : grid.units();
        typename U::Carry carry[kInFlight];
        const int last = end > 0 ? end - 1 : 0;  // 16 dims of 3 bits are less than a unit: there is none to read
        for (int v = 0; v < kInFlight; ++v)
          carry[v] = kDwords >= 8 && parts != 0
                         ? unpack.start_shared(lane(last, v), shared_lane(parts - 1, v), share(v))
                         : unpack.start(lane(last, v));
        sums.spans(
            sb * units, end, [&](int first, int next) __attribute__((always_inline)) {
#pragma GCC unroll 1
              for (int u = first; u < next; ++u) {
                meet_units<S, kInFlight>(
                    unpack, carry,
                    [&](int v) __attribute__((always_inline)) {
                      const uint8_t* p = lane(u, v);
                      if (!kExpanded<Codec> && (!Codec::kAsymmetric || key_group > 0) && level == 0 &&
                          (v0 + v) % kPerBlock == 0)
                        for (int n = 0; n < kLines; ++n) S::prefetch(ahead + (p - a.tile.codes) + n * kLine);
                      return p;
                    },
                    [&](int v, auto j, I levels)
                        __attribute__((always_inline)) { meet(v, j, u * kDwords + j, levels); });
              }
            });
        if constexpr (kDwords >= 8)  // units that lane blocks share, the last ones: each meets its own share
          for (int part = 0; part < (sb == blocks - 1 ? parts : 0); ++part)
            sums.spans(
                part, part + 1, [&](int, int) __attribute__((always_inline)) {
                  unrolled<kInFlight>([&](int v) __attribute__((always_inline)) {
                    const uint8_t* p = shared_lane(part, v);
                    if (level == 0 && (v0 + v) % (kSharers * kPerBlock) == 0)
                      for (int n = 0; n < kLines; ++n) S::prefetch(ahead + (p - a.tile.codes) + n * kLine);
                    unpack.shared(
                        p, share(v), carry[v], [&](auto j, I levels) __attribute__((always_inline)) {
                          meet(v, j, end * kDwords + part * 4 + j, levels);
                        });
                  });
                });
        for (int v = 0; v < kInFlight; ++v) {
          const int token = (v0 + v) * S::kLanes;
          [[maybe_unused]] auto scale = S::zero();
          if constexpr (!Codec::kAsymmetric) scale = load_scales<S>(a.tile.scales + sb * kTile + token);
          if constexpr (kUnit != 1) scale = S::mul(scale, S::set1(static_cast<float>(kUnit)));
          for (int g = 0; g < G; ++g) {
            float* out = a.scores + g * kTile + token;
            const auto sum = S::to_float(sums.acc[g][v]);
            if constexpr (Codec::kAsymmetric) {
              auto before = level > 0 || sb > 0 ? S::load(out) : S::zero();
              if (sb == 0) before = S::add(before, S::set1(own.bias[level][key_group][g]));
              S::store(out, S::fma(sum, S::set1(own.scale[level][key_group][sb][g]), before));
            } else {
              const auto part = S::mul(sum, scale), unit = S::set1(a.rows[g].scale[level][sb]);
              S::store(out,
                       level == a.first && sb == 0 && !a.add ? S::mul(part, unit) : S::fma(part, unit, S::load(out)));
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
      load_elements<S, T>(p, key);
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
