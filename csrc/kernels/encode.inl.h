// Encoders: head vectors of one side of a tile to codes and fp16 scales, then packed lines. The steps are those of
// docs/format.md section 5 and of reference/; encode_steps.inl.h says why their order is fixed.
#pragma once
#include "kernels/asymmetric.inl.h"
#include "kernels/decode.inl.h"
#include "kernels/elements.inl.h"
#include "kernels/encode_steps.inl.h"
#include "kernels/pack.inl.h"
#include "kernels/project.inl.h"
#include "kernels/viterbi.inl.h"

namespace {

// What a scale rule may use: q are the integer levels of the code word.
struct Match {
  float xc, cc;  // <y, q>, <q, q>
};

// The scale that multiplies integer levels in the orthonormal rotated domain, of x 2^-e.
inline float scale_of(kvpack::Rule rule, const Rotated& x, const Match& m, double unit, int head_dim) {
  const float xc = m.xc * unit_norm(head_dim);
  switch (rule) {
    case kvpack::Rule::stored: return x.r * static_cast<float>(unit / __builtin_sqrt(static_cast<double>(head_dim)));
    case kvpack::Rule::mse: return (xc > 0.0F ? xc : 0.0F) / m.cc;
    case kvpack::Rule::unbiased:
      if (xc > 0.0F) return x.n2 / xc;
      [[fallthrough]];
    default: return x.r / __builtin_sqrtf(m.cc);
  }
}

// Squared error of a scale, up to a constant of the vector.
inline float error_of(float scale, const Match& m, int head_dim) {
  return (scale * m.cc - 2.0F * (m.xc * unit_norm(head_dim))) * scale;
}

// The levels above zero, as floats.
template <class Codec>
struct PositiveLevels {
  alignas(32) float level[8];
  constexpr PositiveLevels() : level{} {
    constexpr int kHalf = 1 << (Codec::kBits - 1);
    for (int i = 0; i < kHalf; ++i) level[i] = Codec::kLevels.level[kHalf + i];
  }
};

// The thresholds below |z|, counted by a look-up: every cell of a grid over |z| has at most one of them in it.
template <class Codec>
struct Buckets {
  static constexpr float kPerUnit = static_cast<float>(1 / (8 * Codec::kUnit));
  alignas(64) float threshold[16];
  alignas(64) int32_t below[16];
  bool crowded = false;
  static constexpr int cell(float a) { return a * kPerUnit < 15.0F ? static_cast<int>(a * kPerUnit) : 15; }
  constexpr Buckets() : threshold{}, below{} {
    constexpr int kHalf = 1 << (Codec::kBits - 1);
    for (int c = 0; c < 16; ++c) {
      threshold[c] = __builtin_inff();
      for (int k = 1; k < kHalf; ++k) {
        const float at = kvpack::threshold<Codec>(k);
        if (cell(at) < c) ++below[c];
        if (cell(at) == c) {
          crowded = crowded || threshold[c] != __builtin_inff();
          threshold[c] = at;
        }
      }
    }
  }
};

// The number of thresholds below a = |z|.
template <class S, class Codec>
[[gnu::always_inline]] inline typename S::I count_below(typename S::F a) {
  constexpr int kHalf = 1 << (Codec::kBits - 1);
  if constexpr (kHalf > 4 && requires { S::kLookUp16; }) {
    static constexpr Buckets<Codec> kBuckets{};
    static_assert(!kBuckets.crowded);
    const auto cell = S::truncate_to_int(S::min(S::mul(a, S::set1(kBuckets.kPerUnit)), S::set1(15.0F)));
    return S::count_where_greater(S::look_up_16(kBuckets.below, cell), a, S::look_up_16(kBuckets.threshold, cell));
  } else {
    auto count = S::splat(0);
    for (int k = 1; k < kHalf; ++k) count = S::count_where_greater(count, a, S::set1(kvpack::threshold<Codec>(k)));
    return count;
  }
}

// Lloyd-Max codes of z = y * inv, and their match (<y, q> only where it is asked for). In a search z = y * inv * gain.
template <class S, class Codec, bool Projects, bool Search = false>
Match assign(const float* y, int head_dim, float inv, float gain, uint8_t* codes) {
  using F = typename S::F;
  constexpr int kHalf = 1 << (Codec::kBits - 1);
  static constexpr PositiveLevels<Codec> kPositive{};
  F square = S::zero();
  const float xc = lane_sum<S>(
      head_dim, [&](int i) __attribute__((always_inline)) {
        const F at = S::load(y + i);
        F z = S::mul(at, S::set1(inv));
        if constexpr (Search) z = S::mul(z, S::set1(gain));
        const auto magnitude = count_below<S, Codec>(S::abs(z));
        const F level = S::look_up_8(kPositive.level, magnitude);
        S::store_signed(codes + i, magnitude, z, kHalf);
        square = S::fma(level, level, square);  // exact: integers below 2^24
        return Projects ? S::mul(at, S::copy_sign(level, z)) : S::zero();
      });
  return {xc, S::reduce_add(square)};
}

// What the codes of a vector were made with: the scale, of x 2^-e before it is rounded, and the gain of the search.
struct Chosen {
  float scale, gain;
};

template <class S, class Codec>
int32_t encode_lloyd_max(const kvpack::EncodeArgs& a, const Rotated* vectors, Chosen* chosen = nullptr) {
  using namespace kvpack;
  const bool projects = a.search || a.rule == Rule::mse || a.rule == Rule::unbiased;
  const int d = a.head_dim;
  Match matches[kTile];
  for (int t = 0; t < kTile; ++t) {
    const float inv = 1.0F / vectors[t].r;
    if (vectors[t].live)
      matches[t] = projects ? assign<S, Codec, true>(a.x + t * d, d, inv, 1.0F, a.scratch + t * d)
                            : assign<S, Codec, false>(a.x + t * d, d, inv, 1.0F, a.scratch + t * d);
    else
      __builtin_memset(a.scratch + t * d, 1 << (Codec::kBits - 1), static_cast<size_t>(d));
  }
  // In a loop of its own: the roots and divisions of many tokens overlap.
  int32_t status = 0;
  for (int t = 0; t < kTile; ++t) {
    const Rotated& x = vectors[t];
    a.tile.scales[t] = 0;
    if (!x.live) continue;
    Chosen best{scale_of(a.rule, x, matches[t], Codec::kUnit, d), 1.0F};
    if (a.search) {
      alignas(64) uint8_t trial[kMaxHeadDim];
      float least = error_of(best.scale, matches[t], d);
      for (const float gain : kSearchGains) {
        const Match m = assign<S, Codec, true, true>(a.x + t * d, d, 1.0F / x.r, gain, trial);
        const float scale = scale_of(a.rule, x, m, Codec::kUnit, d), error = error_of(scale, m, d);
        if (error >= least) continue;
        least = error;
        best = {scale, gain};
        __builtin_memcpy(a.scratch + t * d, trial, static_cast<size_t>(d));
      }
    }
    report(status, store_scale(best.scale, x.e, a.tile.scales + t), t);
    if (chosen != nullptr) chosen[t] = best;
  }
  return status;
}

// What the codes of a vector leave of it, in place; the levels are found again, which is quicker than to look them up.
// Returns the lanes of the largest |residual|, and the sum of squares in n2.
template <class S, class Codec>
[[gnu::always_inline]] inline typename S::F leave_residual(float* y, int d, float inv, Chosen chosen, float* n2) {
  using F = typename S::F;
  static constexpr PositiveLevels<Codec> kPositive{};
  const float step = chosen.scale * static_cast<float>(__builtin_sqrt(static_cast<double>(d)));
  F top = S::zero();
  *n2 = lane_sum<S>(
      d, [&](int i) __attribute__((always_inline)) {
        const F at = S::load(y + i), z = S::mul(S::mul(at, S::set1(inv)), S::set1(chosen.gain));
        const F level = S::copy_sign(S::look_up_8(kPositive.level, count_below<S, Codec>(S::abs(z))), z);
        const F rest = S::sub(at, S::mul(S::set1(step), level));
        S::store(y + i, rest);
        top = S::max(top, S::abs(rest));
        return S::mul(rest, rest);
      });
  return top;
}

// The first part, packed; then the signs of the projected residuals, in a.scratch, and their root mean squares.
template <class S, class Codec>
int32_t encode_projected(const kvpack::EncodeArgs& a, const Rotated* vectors) {
  using namespace kvpack;
  using First = typename Codec::First;
  const int d = a.head_dim;
  Chosen chosen[kTile];
  const int32_t first = encode_lloyd_max<S, First>(a, vectors, chosen);
  pack_codes<static_cast<int>(2 * First::kBits), false>(a.scratch, d, a.side, a.tile.codes);
  int32_t status = 0;
  QuantizedResiduals residuals;
  for (int t = 0; t < kTile; ++t) {
    float n2 = 0.0F, top = 0.0F;
    a.tile.scales[kTile + t] = 0;
    if (vectors[t].live) {
      top = S::reduce_max(leave_residual<S, First>(a.x + t * d, d, 1.0F / vectors[t].r, chosen[t], &n2));
      const float rms = __builtin_sqrtf(n2) * static_cast<float>(1.0 / d);
      report(status, store_scale(rms, vectors[t].e, a.tile.scales + kTile + t), t);
    }
    quantize_residual<S>(a.x + t * d, top, d, t, residuals);  // of zeros: signs are 1
  }
  project_signs<S>(a.projection->lines, residuals, d, a.scratch);
  return first == 0 || status == 0 ? first + status : first > status ? first : status;  // the earlier token
}

// Where a trellis encoder works (EncodeArgs::workspace).
template <class Codec>
struct Search {
  kvpack::TrellisWork trellis;
  int16_t fixed[kvpack::kTile * kvpack::kMaxHeadDim];
  uint8_t path[kvpack::kTile * kvpack::kMaxHeadDim], levels[kvpack::kTile * kvpack::kMaxHeadDim];
};

// Codes of a tile at one gain, [token][dim], and the match of every token.
template <class S, class Codec>
void search_tile(const kvpack::EncodeArgs& a, const Rotated* vectors, float gain, uint8_t* codes, Match* matches) {
  using namespace kvpack;
  const bool key = a.side == Side::key;
  const int d = a.head_dim, steps = key ? d : kTile, lanes = key ? kTile : d;
  static_assert(sizeof(Search<Codec>) <= kEncodeWorkspace);
  auto& work = *reinterpret_cast<Search<Codec>*>(a.workspace);
  int16_t* const fixed = work.fixed;
  alignas(64) float z[kMaxHeadDim];
  alignas(64) int16_t row[kMaxHeadDim];
  for (int t = 0; t < kTile; ++t) {
    const auto inv = S::set1(vectors[t].live ? 1.0F / vectors[t].r : 0.0F);
    for (int i = 0; i < d; i += S::kLanes) {
      const auto value = S::mul(S::mul(S::load(a.x + t * d + i), inv), S::set1(gain));
      S::store_int16(row + i, S::mul(value, S::set1(kTrellisFixed)));
    }
    if (key) {
      for (int n = 0; n < d; ++n) fixed[n * kTile + t] = row[trellis_depth(n, d)];
    } else {
      const int n = t / 4 + t % 4 * (kTile / 4);
      __builtin_memcpy(fixed + n * d, row, static_cast<size_t>(d) * 2);
    }
  }
  trellis_search<S, typename Codec::Code>(fixed, steps, lanes, work.path, &work.trellis);
  for (int n = 0; n < steps; ++n)
    for (int l = 0; l < lanes; ++l)
      codes[key ? l * d + trellis_depth(n, d) : trellis_depth(n, kTile) * d + l] = work.path[n * lanes + l];
  __builtin_memcpy(work.levels, codes, static_cast<size_t>(kTile) * static_cast<size_t>(d));
  codes_to_levels<Codec>(work.levels, d, a.side);
  for (int t = 0; t < kTile; ++t) {
    const auto* q = reinterpret_cast<const int8_t*>(work.levels) + t * d;
    int32_t cc = 0;
    for (int i = 0; i < d; ++i) {
      cc += q[i] * q[i];
      z[i] = static_cast<float>(q[i]);
    }
    const float xc = lane_sum<S>(d, [&](int i) { return S::mul(S::load(a.x + t * d + i), S::load(z + i)); });
    matches[t] = {xc, static_cast<float>(cc > 1 ? cc : 1)};
  }
}

template <class S, class Codec>
int32_t encode_trellis(const kvpack::EncodeArgs& a, const Rotated* vectors) {
  using namespace kvpack;
  const int d = a.head_dim;
  Match matches[kTile];
  float scales[kTile];
  search_tile<S, Codec>(a, vectors, 1.0F, a.scratch, matches);
  for (int t = 0; t < kTile; ++t) scales[t] = scale_of(a.rule, vectors[t], matches[t], Codec::kUnit, d);
  if (a.search) {
    // Sequences of keys belong to one token each, those of values run through all of them: the gain is chosen per
    // token or per tile.
    const int each = a.side == Side::key ? 1 : kTile;
    float best[kTile], other[kTile];
    const auto error = [&](const float* s, int first) {
      float sum = 0.0F;
      for (int t = first; t < first + each; ++t) {
        const float relative = error_of(s[t], matches[t], d) / vectors[t].n2;
        sum = sum + (vectors[t].live ? relative : 0.0F);
      }
      return sum;
    };
    for (int t = 0; t < kTile; t += each) best[t] = error(scales, t);
    alignas(64) uint8_t trial[kTile * kMaxHeadDim];
    for (const float gain : kSearchGains) {
      search_tile<S, Codec>(a, vectors, gain, trial, matches);
      for (int t = 0; t < kTile; ++t) other[t] = scale_of(a.rule, vectors[t], matches[t], Codec::kUnit, d);
      for (int t = 0; t < kTile; t += each) {
        const float e = error(other, t);
        if (e >= best[t]) continue;
        best[t] = e;
        for (int n = t; n < t + each; ++n) {
          scales[n] = other[n];
          __builtin_memcpy(a.scratch + n * d, trial + n * d, static_cast<size_t>(d));
        }
      }
    }
  }
  int32_t status = 0;
  for (int t = 0; t < kTile; ++t) {
    a.tile.scales[t] = 0;
    if (vectors[t].live) report(status, store_scale(scales[t], vectors[t].e, a.tile.scales + t), t);
  }
  return status;
}

// ggml's block formats: one block of every token after the other, in loops of their own, so that reductions and
// divisions of many tokens overlap. Scaling by a power of two first changes nothing but the range. The exponent and the
// norm of a rotated vector (vectors, else null) go into its scales.
template <class S, class Codec>
int32_t encode_block(const kvpack::EncodeArgs& a, const Rotated* vectors, int block) {
  using namespace kvpack;
  using F = typename S::F;
  constexpr bool kByte = Codec::kBits == 8;
  constexpr int kBlock = Codec::kScaleBlock;
  constexpr auto kMiddle = static_cast<float>(1 << (Codec::kBits - 1));
  const int d = a.head_dim, first = block * kBlock, dims = d - first < kBlock ? d - first : kBlock;
  const auto row = [&](int t) { return (vectors != nullptr ? a.x + t * d : a.from + t * a.stride) + first; };
  const float norm = unit_norm(d);
  uint16_t* scales = a.tile.scales + block * kTile;
  float extreme[kTile], down[kTile], again[kTile], inv[kTile];  // the element of the largest magnitude; factors of x
  int32_t status = 0;
  bool deep = false;  // whether there are elements so small that it takes two factors to scale them
  for (int t = 0; t < kTile; ++t) {
    extreme[t] = max_abs<S>(row(t), dims);
    if (!Codec::kRotated && !is_finite(extreme[t])) report(status, kNonFinite, t);
  }
  if (status != 0) return status;
  if constexpr (!kByte)
    for (int t = 0; t < kTile; ++t) {
      uint32_t largest = 0;
      for (int i = 0; i < dims; i += S::kLanes)
        largest |= S::equal_lanes(S::abs(S::load(row(t) + i)), S::set1(extreme[t])) << i;
      extreme[t] = row(t)[__builtin_ctz(largest)];
    }
  for (int t = 0; t < kTile; ++t) {
    const float m = __builtin_fabsf(extreme[t]);
    scales[t] = 0;
    down[t] = again[t] = inv[t] = 0.0F;  // of zeros: codes in the middle
    if (m == 0.0F) continue;
    const PowerOfTwo power(m);
    const float step = extreme[t] * power.down * power.down_again / (kByte ? 127.0F : -kMiddle);
    down[t] = power.down;
    again[t] = power.down_again;
    inv[t] = 1.0F / step;
    deep = deep || power.down_again != 1.0F;
    const int e = vectors != nullptr ? vectors[t].e : 0;
    report(status, store_scale(Codec::kRotated ? step * norm : step, power.e + e, scales + t), t);
  }
  for (int t = 0; t < kTile; ++t)
    for (int i = 0; i < dims; i += S::kLanes) {
      uint8_t* to = a.scratch + t * d + first + i;
      F y = S::mul(S::load(row(t) + i), S::set1(down[t]));
      if (deep) y = S::mul(y, S::set1(again[t]));
      y = S::mul(y, S::set1(inv[t]));
      if constexpr (kByte)
        S::store_low_bytes(to, S::add(S::round_even(y), S::set1(128.0F)));
      else  // truncates
        S::store_low_bytes(to, S::min(S::add(y, S::set1(kMiddle + 0.5F)), S::set1(2.0F * kMiddle - 1.0F)));
    }
  return status;
}

template <class S, class Codec>
int32_t encode_blocks(const kvpack::EncodeArgs& a, const Rotated* vectors) {
  const int blocks = kvpack::scale_blocks(Codec::kScaleBlock, Codec::kBits, a.head_dim);
  int32_t status = 0;
  for (int b = 0; b < blocks; ++b) status = first_of(status, encode_block<S, Codec>(a, vectors, b));
  return status;
}

template <class S, class Codec>
int32_t encode(const kvpack::EncodeArgs& a) {
  using kvpack::kTile;
  int32_t status = 0;
  if constexpr (Codec::kElements) {
    return encode_elements<S>(a);
  } else if constexpr (Codec::kAsymmetric) {
    status = encode_asymmetric<S, Codec>(a);
  } else if constexpr (Codec::kRotated) {
    Rotated vectors[kTile];
    constexpr bool kNorm = Codec::kScaleRules;  // blocks have scales of their own
    status = for_head_dim(a.head_dim, [&]<int D>() { return to_rotated<S, D, kNorm>(a, vectors); });
    if (status != 0) return status;
    if constexpr (Codec::kTrellis)
      status = encode_trellis<S, Codec>(a, vectors);
    else if constexpr (Codec::kProjected)
      status = encode_projected<S, Codec>(a, vectors);
    else if constexpr (Codec::kScaleRules)
      status = encode_lloyd_max<S, Codec>(a, vectors);
    else
      status = encode_blocks<S, Codec>(a, vectors);
  } else {
    status = encode_blocks<S, Codec>(a, nullptr);
  }
  if (status != 0) return status;
  if constexpr (kvpack::TwoParts<Codec>)
    pack_codes<static_cast<int>(2 * Codec::Second::kBits), false>(
        a.scratch, a.head_dim, a.side, a.tile.codes + kvpack::code_bytes_of<typename Codec::First>(a.head_dim));
  else
    pack_codes<static_cast<int>(2 * Codec::kBits), Codec::kTrellis>(a.scratch, a.head_dim, a.side, a.tile.codes);
  return status;
}

}  // namespace
