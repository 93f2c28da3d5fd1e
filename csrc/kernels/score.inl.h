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

// Dims at.. of a query row, times `inv`, -> levels of int8, and per level the sum of their vectors.
template <class S>
[[gnu::always_inline]] inline void quantize_dims(const float* q, int dims, float inv, int levels, int at,
                                                 kvpack::QueryRow& row, typename S::F* sum) {
  using F = typename S::F;
  for (int n = 0; n < levels; ++n) sum[n] = S::zero();
  for (int i = 0; i < dims; i += S::kLanes) {
    F v = S::mul(S::load(q + i), S::set1(inv));
    for (int n = 0; n < levels; ++n) {
      const F level = S::round_even(v);
      S::store_operand(row.operand[n] + at / 4, i, level);
      sum[n] = S::add(sum[n], level);
      v = S::mul(S::sub(v, level), S::set1(254.0F));
    }
  }
}

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
  const int block = a.scale_block == 0 ? a.head_dim : a.scale_block;
  for (int sb = 0; sb * block < a.head_dim; ++sb) {
    const int left = a.head_dim - sb * block, dims = left < block ? left : block;
    const float* q = a.query + sb * block;
    typename S::F top = S::zero(), sum[kQueryLevels];
    for (int i = 0; i < dims; i += S::kLanes) top = S::max(top, S::abs(S::load(q + i)));
    const float max = S::reduce_max(top);
    quantize_dims<S>(q, dims, query_inverse(max), a.levels, sb * block, *a.row, sum);
    float step = query_step(max);
    for (int n = 0; n < a.levels; ++n, step /= 254.0F) {
      a.row->scale[n][sb] = step;
      a.row->offset[n][sb] = kSumsQueries<S> ? -128 * static_cast<int>(S::reduce_add(sum[n])) : 0;
    }
  }
}

// The query rows of each group of 32 asymmetric keys: q times half the steps of the channels, with a scale per 32 of
// them, as their sizes differ. Leaves in `bias` what the middles of the channels add to every score of the group.
//
// In three loops, of products and their largest, of divisions, and of levels: each waits for reductions that those of
// the next blocks overlap with; rows lie side by side for the same reason.
template <class S, class Codec, int G>
[[gnu::always_inline]] inline void quantize_asymmetric_queries(const kvpack::ScoreArgs& a,
                                                               kvpack::QueryRow (&rows)[G][kvpack::kKeyGroups],
                                                               float (&bias)[kvpack::kKeyGroups][4]) {
  using namespace kvpack;
  using F = typename S::F;
  constexpr int kBlock = Codec::kScaleBlock;
  static_assert(kBlock == 32);
  const int blocks = (a.head_dim + kBlock - 1) / kBlock;
  const auto dims_of = [&](int sb) { return a.head_dim - sb * kBlock < kBlock ? a.head_dim - sb * kBlock : kBlock; };
  alignas(64) float scaled[kKeyGroups][G][kMaxHeadDim];
  float max[kKeyGroups * kMaxScaleBlocks][4], inverse[kKeyGroups * kMaxScaleBlocks][4];
  for (int n = 0; n < kKeyGroups; ++n) {
    F middles[4];
    for (int g = 0; g < 4; ++g) middles[g] = S::zero();
    for (int sb = 0; sb < blocks; ++sb) {
      const uint16_t* steps = a.tile.scales + n * a.head_dim + sb * kBlock;
      const uint16_t* zeros = steps + kKeyGroups * a.head_dim;
      F top[4];
      for (int g = 0; g < 4; ++g) top[g] = S::zero();
      for (int i = 0, dims = dims_of(sb); i < dims; i += S::kLanes) {
        const F step = load_scales<S>(steps + i), half = S::mul(step, S::set1(0.5F));
        const F middle = S::fma(step, S::set1(Codec::kMiddle), load_scales<S>(zeros + i));
        unrolled<G>([&](int g) __attribute__((always_inline)) {
          const F q = S::load(a.query + g * a.head_dim + sb * kBlock + i), v = S::mul(q, half);
          S::store(scaled[n][g] + sb * kBlock + i, v);
          top[g] = S::max(top[g], S::abs(v));
          middles[g] = S::fma(q, middle, middles[g]);
        });
      }
      S::reduce_max_4(top[0], top[1], top[2], top[3], max[n * blocks + sb]);
    }
    S::reduce_add_4(middles[0], middles[1], middles[2], middles[3], bias[n]);
  }
  for (int i = 0; i < kKeyGroups * blocks; ++i) {
    store_4(inverse[i], query_inverse(load_4(max[i])));
    Four step = query_step(load_4(max[i]));
    for (int l = 0; l < a.levels; ++l, step *= 1.0F / 254.0F)
      for (int g = 0; g < G; ++g) rows[g][i / blocks].scale[l][i % blocks] = step[g];
  }
  const auto quantize = [&](int i, int dims, int levels) __attribute__((always_inline)) {
    const int n = i / blocks, sb = i % blocks;
    F sum[4][kQueryLevels];
    for (int l = 0; l < levels; ++l)
      for (int g = 0; g < 4; ++g) sum[g][l] = S::zero();
    for (int g = 0; g < G; ++g)
      quantize_dims<S>(scaled[n][g] + sb * kBlock, dims, inverse[i][g], levels, sb * kBlock, rows[g][n], sum[g]);
    for (int l = 0; l < levels; ++l) {
      IntFour offset{};
      if constexpr (kSumsQueries<S>) {
        float total[4];
        S::reduce_add_4(sum[0][l], sum[1][l], sum[2][l], sum[3][l], total);
        offset = __builtin_convertvector(load_4(total) * -128.0F, IntFour);
      }
      for (int g = 0; g < G; ++g) rows[g][n].offset[l][sb] = offset[g];
    }
  };
  for (int i = 0; i < kKeyGroups * blocks; ++i) {
    const int dims = dims_of(i % blocks);
    if (dims == kBlock && a.levels == 1)  // numbers that the compiler knows
      quantize(i, kBlock, 1);
    else
      quantize(i, dims, a.levels);
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
  constexpr int kSharers = unit_sharers(Codec::kBits), kUnit = level_unit<S, Codec, Side::key>();
  static_assert(!Codec::kAsymmetric || kUnit == 1);  // it goes into the scales of tokens
  constexpr int kRowDwords = static_cast<int>(sizeof(QueryRow) / 4) * (Codec::kAsymmetric ? kKeyGroups : 1);
  const int blocks = scale_blocks(Codec::kScaleBlock, Codec::kBits, a.head_dim);
  [[maybe_unused]] QueryRow own[Codec::kAsymmetric ? G : 1][kKeyGroups];
  [[maybe_unused]] float bias[kKeyGroups][4];
  if constexpr (Codec::kAsymmetric) quantize_asymmetric_queries<S, Codec, G>(a, own, bias);
  const CodeGrid grid{Codec::kBits, kTile, a.head_dim};
  const int parts = grid.parts();
  const int units = blocks == 1 ? grid.units() : Codec::kScaleBlock / (4 * kDwords);  // of a scale block
  const uint8_t* ahead = a.ahead;
  for (int level = a.first; level < a.levels; ++level) {
    for (int v0 = 0; v0 < kVectors; v0 += kInFlight) {
      [[maybe_unused]] const int key_group = v0 / kPerRow;
      // Those of the first row of the group; the others' are kRowDwords apart.
      const QueryRow* rows = a.rows;
      if constexpr (Codec::kAsymmetric) rows = &own[0][key_group];
      const int32_t *operands = rows->operand[level], *offsets = rows->offset[level];
      const float* units_of = rows->scale[level];
      for (int sb = 0; sb < blocks; ++sb) {
        Sums<S, Codec, Side::key, G, kInFlight, kDwords> sums;
        for (int g = 0; g < G; ++g)
          for (int v = 0; v < kInFlight; ++v)
            sums.acc[g][v] = S::splat(key_begin<S, Codec>(offsets[g * kRowDwords + sb]));
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
                      if (!kExpanded<Codec> && level == 0 && (v0 + v) % kPerBlock == 0)
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
            const auto sum = S::to_float(sums.acc[g][v]), unit = S::set1(units_of[g * kRowDwords + sb]);
            if constexpr (Codec::kAsymmetric) {
              S::store(out, S::fma(sum, unit, level == 0 && sb == 0 ? S::set1(bias[key_group][g]) : S::load(out)));
            } else {
              const auto part = S::mul(sum, scale);
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
