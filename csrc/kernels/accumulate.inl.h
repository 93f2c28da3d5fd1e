// accumulate: outputs of a group of rows += probabilities x decoded values of a tile, in integers.
//
// Lanes are dims and depths are tokens, so the loop is the one of score: every level vector (16 dims x 4 tokens on
// 512 bits) meets the broadcast dword of 4 quantized probabilities of every row. The token scale is folded into the
// probability before it is quantized, per row and scale block.
//
// Probabilities: one byte with a fixed dither (floor(x + u_token)): plain rounding drops a coherent tail below half a
// step and doubles the error of a spiky tile. Precision "high": two bytes, no dither.
//
// Levels with an offset (kValueOffset): sums begin with minus the offset times the sum of the quantized probabilities.
//
// Overflow: |acc| <= 64 tokens * 255 * 128 = 2.1e6 < 2^31; with two bytes each plane keeps that bound. With an offset
// of 128, the tokens that a sum has not met yet count as if their level was -128: no more than that.
#pragma once
#include "kernels/blocking.inl.h"
#include "kernels/table.h"
#include "kernels/unpack.inl.h"

namespace {

// u_token = a permutation of (i + 1/2)/64, twice over so that a tile may start anywhere in it.
struct Dither {
  float u[2 * kvpack::kTile];
  constexpr Dither() : u{} {
    for (int i = 0; i < 2 * kvpack::kTile; ++i) u[i] = (static_cast<float>((i * 37) & 63) + 0.5F) / 64.0F;
  }
};
constexpr Dither kDither{};

// Four bytes per dword, 0xff where a token's scale is negative: there its level bytes are negated instead.
[[maybe_unused]] inline void sign_bytes(const uint16_t* scales, int32_t* out) {
  uint8_t byte[kvpack::kTile];
  for (int t = 0; t < kvpack::kTile; ++t) byte[t] = static_cast<uint8_t>(-(scales[t] >> 15));
  __builtin_memcpy(out, byte, sizeof byte);
}

// Quantized probabilities of the tokens of a tile, for up to `Blocks` blocks of dims that have scales of their own.
template <int Blocks, int G, bool High>
struct Weights {
  static constexpr int kPlanes = High ? 2 : 1;
  alignas(64) int32_t operand[Blocks][kPlanes][G][kvpack::kTile / 4];
  float worth[Blocks][4];             // of a unit of the integer sums
  int32_t begin[Blocks][kPlanes][4];  // what they begin with
};

struct Nothing {
  void operator()(int /*step*/) const {}
};

// Quantizes probs[G][64] * |scales[64]| into operands of 64 depths, row by row, per plane, for each of `blocks` rows of
// scales. Largest: the largest size of a level. In loops of their own: products and their largest, divisions, levels;
// reductions of a block overlap with the next, as rows do, side by side. The first and the last loop call
// meanwhile(step), a step for each block.
template <class S, int Largest, int Blocks, int G, bool High, class Meanwhile = Nothing>
[[gnu::always_inline]] inline void quantize_probs(const float* probs, const uint16_t* scales, int dither, int blocks,
                                                  Weights<Blocks, G, High>& to, Meanwhile meanwhile = {}) {
  using namespace kvpack;
  using F = typename S::F;
  constexpr int kBase = S::kProbBase, kPlanes = High ? 2 : 1;
  // Even: the halves of a pair of equal ones are whole.
  constexpr float kSteps = static_cast<float>(High ? 256 * kBase - 2 : 254);
  constexpr int kVectors = kTile / S::kLanes;
  if constexpr (Blocks == 1) blocks = 1;
  F product[G][kVectors];
  const auto multiply = [&](int block, auto&& use) __attribute__((always_inline)) {
    for (int i = 0; i < kVectors; ++i) {
      const F scale = S::abs(load_scales<S>(scales + block * kTile + i * S::kLanes));
      unrolled<G>([&](int g) __attribute__((always_inline)) {
        product[g][i] = S::mul(S::load(probs + g * kTile + i * S::kLanes), scale);
        use(g, i);
      });
    }
  };
  float max[Blocks][4], to_steps[Blocks][4];
  for (int block = 0; block < blocks; ++block) {
    F top[4];
    for (int g = 0; g < 4; ++g) top[g] = S::set1(1e-30F);
    meanwhile(block);
    multiply(
        block, [&](int g, int i) __attribute__((always_inline)) {
          top[g] = S::max(top[g], S::template prob_bound<Largest>(product[g][i]));
        });
    S::reduce_max_4(top[0], top[1], top[2], top[3], max[block]);
  }
  for (int block = 0; block < blocks; ++block) {
    store_4(to_steps[block], kSteps / load_4(max[block]));
    store_4(to.worth[block], load_4(max[block]) * (1.0F / kSteps));
  }
  for (int block = 0; block < blocks; ++block) {
    if constexpr (Blocks > 1) multiply(block, [](int, int) {});
    meanwhile(blocks + block);
    [[maybe_unused]] F sum[kPlanes][4];
    if constexpr (S::kValueOffset != 0)
      for (int i = 0; i < 4 * kPlanes; ++i) sum[i / 4][i % 4] = S::zero();
    const auto put = [&](int n, int g, const F(&v)[kVectors]) __attribute__((always_inline)) {
      S::store_tile(to.operand[block][n][g], v);
      if constexpr (S::kValueOffset != 0)
        for (int i = 0; i < kVectors; ++i) sum[n][g] = S::add(sum[n][g], S::truncate(v[i]));
    };
    unrolled<G>([&](int g) __attribute__((always_inline)) {
      const F unit = S::set1(to_steps[block][g]);
      F first[kVectors], second[kVectors];
      for (int i = 0; i < kVectors; ++i) {
        if constexpr (High) {
          const F whole = S::min(S::round_even(S::mul(product[g][i], unit)), S::set1(kSteps));
          first[i] = S::truncate(S::mul(whole, S::set1(1.0F / kBase)));
          second[i] = S::fma(first[i], S::set1(-static_cast<float>(kBase)), whole);
        } else {
          first[i] = S::fma(product[g][i], unit, S::load(kDither.u + dither + i * S::kLanes));
        }
      }
      put(0, g, first);
      if constexpr (High) put(1, g, second);
    });
    if constexpr (S::kValueOffset != 0)
      for (int n = 0; n < kPlanes; ++n) {
        float total[4];
        S::reduce_add_4(sum[n][0], sum[n][1], sum[n][2], sum[n][3], total);
        // Probabilities that are NaN have no sum; attend makes the row NaN.
        for (int g = 0; g < G; ++g)
          to.begin[block][n][g] = total[g] == total[g] ? -S::kValueOffset * static_cast<int32_t>(total[g]) : 0;
      }
  }
}

// Probabilities times the middles, zero + step * kMiddle, of 64 tokens.
template <class S, class Codec, int G>
[[gnu::always_inline]] inline void middles_of(const float* probs, const uint16_t* steps, const uint16_t* zeros,
                                              float (&bias)[4]) {
  typename S::F sum[4] = {S::zero(), S::zero(), S::zero(), S::zero()};
  for (int t = 0; t < kvpack::kTile; t += S::kLanes) {
    const auto middle = S::fma(load_scales<S>(steps + t), S::set1(Codec::kMiddle), load_scales<S>(zeros + t));
    unrolled<G>([&](int g) __attribute__((always_inline)) {
      sum[g] = S::fma(S::load(probs + g * kvpack::kTile + t), middle, sum[g]);
    });
  }
  S::reduce_add_4(sum[0], sum[1], sum[2], sum[3], bias);
}

template <class S, class Codec, int G, bool High>
void accumulate_planes(const kvpack::AccumulateArgs& a) {
  using namespace kvpack;
  using I = typename S::I;
  constexpr int kInFlight = vectors_in_flight<S>(G), kPerBlock = 16 / S::kLanes, kPlanes = High ? 2 : 1;
  // Vectors in flight must not straddle scale blocks: they share one operand.
  static_assert(Codec::kScaleBlock == 0 || Codec::kScaleBlock == 32);
  constexpr int kStep = Codec::kScaleBlock == 0 ? kInFlight : (kInFlight * S::kLanes > 32 ? 32 / S::kLanes : kInFlight);
  const Unpacker<S, Codec, Side::value> unpack;
  constexpr int kDwords = decltype(unpack)::kDwords, kLines = decltype(unpack)::kLines;
  const CodeGrid grid{Codec::kBits, a.head_dim, kTile};
  const int blocks = scale_blocks(Codec::kScaleBlock, Codec::kBits, a.head_dim);
  // Blocks of dims whose probabilities are quantized together. Bytes take them one by one: nothing is read from memory
  // meanwhile, and there is much to read (Zen 5, q8_0: 13 % of the time of attention over cold tiles).
  constexpr bool kOneByOne = Codec::kScaleBlock != 0 && Codec::kBits == 8;
  constexpr int kBlocks = Codec::kScaleBlock == 0 || kOneByOne ? 1 : kMaxScaleBlocks;
  static_assert(!kOneByOne || (!Codec::kSignedScales && !Codec::kAsymmetric));
  [[maybe_unused]] int32_t negative[Codec::kSignedScales ? kBlocks : 1][kTile / 4];
  if constexpr (Codec::kSignedScales)
    for (int block = 0; block < blocks; ++block) sign_bytes(a.tile.scales + block * kTile, negative[block]);
  // Of a tile to come, the first half of the units of every superblock is prefetched while many probabilities are
  // quantized: prefetches in a burst wait for each other (Zen 5, kivi4: 3 % of the time of attention over cold tiles).
  // A superblock has two blocks, and a block two steps; where there is half a block, some lines are prefetched twice.
  constexpr int kAheadUnits = kBlocks == 1 ? 0 : kTile / (4 * kDwords) / 2;
  Weights<kBlocks, G, High> weights;
  if constexpr (!kOneByOne)
    quantize_probs<S, largest_level<Codec>()>(
        a.probs, a.tile.scales, a.dither, blocks, weights, [&](int step) __attribute__((always_inline)) {
          const uint8_t* at = a.ahead + (grid.line(step / 4, 0, 0) + step % 4 * kAheadUnits * kLines * kLine);
          for (int n = 0; n < kAheadUnits * kLines; ++n) S::prefetch(at + n * kLine);
        });
  [[maybe_unused]] int ready = -1;
  [[maybe_unused]] float bias[Codec::kAsymmetric ? kBlocks : 1][4];  // what the middles of a block add to its dims
  if constexpr (Codec::kAsymmetric)
    for (int block = 0; block < blocks; ++block) {
      const uint16_t* steps = a.tile.scales + block * kTile;
      middles_of<S, Codec, G>(a.probs, steps, steps + blocks * kTile, bias[block]);
    }
  constexpr float kUnit = (Codec::kAsymmetric ? 0.5F : 1.0F) * common_factor<Codec>();
  // `Step` vectors of a superblock, from v0 on.
  const auto step = [&]<int Step>(std::integral_constant<int, Step>, int sb, int v0) __attribute__((always_inline)) {
    const uint8_t* base = a.tile.codes + grid.line(sb, 0, 0);
    const int lane_blocks = grid.lane_blocks(sb), block = blocks == 1 ? 0 : (sb * 64 + v0 * S::kLanes) / 32;
    if constexpr (kOneByOne)
      if (block != ready) {
        quantize_probs<S, largest_level<Codec>()>(a.probs, a.tile.scales + block * kTile, a.dither, 1, weights);
        ready = block;
      }
    const int own = kOneByOne ? 0 : block;
    const int32_t* operand = unknown(weights.operand[own][0][0]);
    Sums<S, Codec, Side::value, kPlanes * G, Step, kDwords> sums;  // planes of a row side by side
    for (int n = 0; n < kPlanes; ++n)
      for (int g = 0; g < G; ++g)
        for (int v = 0; v < Step; ++v)
          sums.acc[g * kPlanes + n][v] = S::splat(S::kValueOffset == 0 ? 0 : weights.begin[own][n][g]);
    const auto lane = [&](int u, int v) {
      const int at = v0 + v;
      return base + static_cast<size_t>(u * lane_blocks + at / kPerBlock) * kLines * kLine +
             at % kPerBlock * 4 * S::kLanes;
    };
    typename decltype(unpack)::Carry carry[Step];
    for (int v = 0; v < Step; ++v) carry[v] = unpack.start(lane(grid.units() - 1, v));
    sums.spans(
        0, grid.units(), [&](int first, int next) __attribute__((always_inline)) {
          for (int u = first; u < next; ++u) {
            meet_units<S, Step>(
                unpack, carry,
                [&](int v) __attribute__((always_inline)) {
                  const uint8_t* p = lane(u, v);
                  if (!kExpanded<Codec> && u >= kAheadUnits && (v0 + v) % kPerBlock == 0)
                    for (int n = 0; n < kLines; ++n) S::prefetch(a.ahead + (p - a.tile.codes) + n * kLine);
                  return p;
                },
                [&](int v, auto j, I levels) __attribute__((always_inline)) {
                  if constexpr (Codec::kSignedScales)
                    levels = S::negate_bytes(levels, S::splat(negative[own][u * kDwords + j]));
                  const typename S::Code code = S::expand(levels);
                  const int depth = u * kDwords + j;
                  unrolled<G * kPlanes>([&](int i) __attribute__((always_inline)) {
                    sums.meet(j, i, v, code, operand + (i % kPlanes * G + i / kPlanes) * (kTile / 4) + depth);
                  });
                });
          }
        });
    for (int g = 0; g < G; ++g)
      for (int v = 0; v < Step; ++v) {
        float* out = a.out + static_cast<ptrdiff_t>(g) * a.out_stride + sb * 64 + (v0 + v) * S::kLanes;
        typename S::F sum = S::to_float(sums.acc[g * kPlanes][v]);
        if constexpr (High)
          sum = S::fma(sum, S::set1(static_cast<float>(S::kProbBase)),
                       S::to_float(sums.acc[g * kPlanes + kPlanes - 1][v]));
        typename S::F before = S::load(out);
        if constexpr (Codec::kAsymmetric) before = S::add(before, S::set1(bias[own][g]));
        S::store(out, S::fma(sum, S::set1(weights.worth[own][g] * kUnit), before));
      }
  };
  for (int sb = 0; sb < grid.superblocks(); ++sb) {
    const int vectors = grid.lane_blocks(sb) * kPerBlock;
    int v0 = 0;
    for (; v0 + kStep <= vectors; v0 += kStep) step(std::integral_constant<int, kStep>{}, sb, v0);
    // Lane blocks that do not fill a step: the last ones of a head size that is no multiple of 64.
    if constexpr (kStep > kPerBlock)
      for (; v0 < vectors; v0 += kPerBlock) step(std::integral_constant<int, kPerBlock>{}, sb, v0);
  }
}

template <class S, class Codec, int G>
void accumulate(const kvpack::AccumulateArgs& a) {
  if (a.levels == 2)
    accumulate_planes<S, Codec, G, true>(a);
  else
    accumulate_planes<S, Codec, G, false>(a);
}

}  // namespace
