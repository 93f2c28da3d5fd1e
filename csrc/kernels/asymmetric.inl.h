// Asymmetric codes (codecs/kivi.h): encode and decode. Steps as in docs/format.md section 5. Values: the lanes of a
// vector are the dims of a group, whose range is reduced. Keys: they are channels, each with groups of its own.
#pragma once
#include "kernels/encode_steps.inl.h"
#include "kernels/pack.inl.h"

namespace {

constexpr float kLeastStep = 0x1p-100F;  // smaller ones count as 0

// Lanes of groups: steps and zeros of x 2^-e.
template <class S, class Codec>
struct Ranges {
  typename S::F step, zero, inv;
  static Ranges of(typename S::F low, typename S::F high) {
    const auto least = S::set1(kLeastStep), zero = S::add(low, S::zero());  // -0 becomes 0
    const auto step = S::div(S::sub(high, zero), S::set1(2.0F * Codec::kMiddle));
    return {S::zero_where_less(step, step, least), zero,
            S::zero_where_less(S::div(S::set1(1.0F), S::max(step, least)), step, least)};
  }
  // Key vectors of zeros may lie outside of the range.
  void code(typename S::F x, uint8_t* to) const {
    const auto y = S::round_even(S::mul(S::sub(x, zero), inv));
    S::store_low_bytes(to, S::min(S::max(y, S::zero()), S::set1(2.0F * Codec::kMiddle)));
  }
};

template <class S>
[[gnu::always_inline]] inline typename S::F scaled(const float* x, const PowerOfTwo& power) {
  const auto v = S::mul(S::load(x), S::set1(power.down));
  return power.down_again == 1.0F ? v : S::mul(v, S::set1(power.down_again));
}

// Of the largest |x|; a group of zeros has none.
inline PowerOfTwo power_of(float m) { return PowerOfTwo(m == 0.0F ? 1.0F : m); }

// One group of every token after the other, in loops of their own, so that reductions and divisions overlap.
template <class S, class Codec>
int32_t encode_asymmetric_values(const kvpack::EncodeArgs& a) {
  using namespace kvpack;
  using F = typename S::F;
  constexpr int kBlock = Codec::kScaleBlock;
  const int d = a.head_dim, blocks = scale_blocks(kBlock, Codec::kBits, d);
  int32_t status = 0;
  F zeros = S::zero();  // NaN once there is an infinity or a NaN
  for (int b = 0; b < blocks; ++b) {
    const int dims = d - b * kBlock < kBlock ? d - b * kBlock : kBlock;
    const auto row = [&](int t) { return a.from + t * a.stride + b * kBlock; };
    float top[kTile], bottom[kTile], inv[kTile];
    for (int t = 0; t < kTile; ++t) {
      F high = S::load(row(t)), low = S::sub(S::zero(), high);
      zeros = S::fma(high, S::zero(), zeros);
      for (int i = S::kLanes; i < dims; i += S::kLanes) {
        const F v = S::load(row(t) + i);
        zeros = S::fma(v, S::zero(), zeros);
        high = S::max(high, v);
        low = S::max(low, S::sub(S::zero(), v));
      }
      top[t] = S::reduce_max(high);
      bottom[t] = 0.0F - S::reduce_max(low);
    }
    if (!is_finite(S::reduce_max_bits(S::abs(zeros)))) {
      status = 0;
      for (int t = 0; t < kTile; ++t)
        if (!is_finite(max_abs<S>(a.from + t * a.stride, d))) report(status, kNonFinite, t);
      return status;
    }
    int32_t own = 0;
    PowerOfTwo powers[kTile];
    for (int t = 0; t < kTile; ++t) {  // as Ranges::of
      const float m = top[t] > -bottom[t] ? top[t] : -bottom[t];
      const PowerOfTwo power = power_of(m);
      const float zero = bottom[t] * power.down * power.down_again;
      const float step = (top[t] * power.down * power.down_again - zero) / (2.0F * Codec::kMiddle);
      const bool some = step >= kLeastStep;
      powers[t] = power;
      bottom[t] = zero;
      inv[t] = some ? 1.0F / step : 0.0F;
      report(own, store_scale(some ? step : 0.0F, power.e, a.tile.scales + b * kTile + t), t);
      report(own, store_scale(zero, power.e, a.tile.scales + (blocks + b) * kTile + t), t);
    }
    for (int t = 0; t < kTile; ++t) {
      const Ranges<S, Codec> range{S::zero(), S::set1(bottom[t]), S::set1(inv[t])};
      for (int i = 0; i < dims; i += S::kLanes)
        range.code(scaled<S>(row(t) + i, powers[t]), a.scratch + t * d + b * kBlock + i);
    }
    status = first_of(status, own);
  }
  return status;
}

// The first largest key of a channel: it made the scale.
inline int largest_key(const kvpack::EncodeArgs& a, int first, int channel) {
  int found = first;
  const auto size = [&](int t) { return __builtin_fabsf(a.from[t * a.stride + channel]); };
  for (int t = first; t < first + kvpack::kTile / kvpack::kKeyGroups; ++t)
    if (size(t) > size(found)) found = t;
  return found;
}

template <class S, class Codec>
int32_t encode_asymmetric_keys(const kvpack::EncodeArgs& a) {
  using namespace kvpack;
  using F = typename S::F;
  constexpr int kTokens = kTile / kKeyGroups;
  const int d = a.head_dim;
  int32_t status = 0;
  float each[kTile];
  for (int t = 0; t < kTile; ++t) {
    each[t] = max_abs<S>(a.from + t * a.stride, d);
    if (!is_finite(each[t])) report(status, kNonFinite, t);
  }
  if (status != 0) return status;
  for (int n = 0; n < kKeyGroups; ++n) {
    const int first = n * kTokens;
    int live[kTokens], tokens = 0;  // those that are not all zeros
    float m = 0.0F;
    for (int t = first; t < first + kTokens; ++t) {
      if (each[t] > 0.0F) live[tokens++] = t;
      m = each[t] > m ? each[t] : m;
    }
    const PowerOfTwo power = power_of(m);
    for (int i = 0; i < d; i += S::kLanes) {
      F low = S::zero(), high = low;
      for (int k = 0; k < tokens; ++k) {
        const F v = scaled<S>(a.from + live[k] * a.stride + i, power);
        low = k == 0 ? v : S::min(low, v);
        high = k == 0 ? v : S::max(high, v);
      }
      const auto range = Ranges<S, Codec>::of(low, high);
      for (int t = first; t < first + kTokens; ++t)
        range.code(scaled<S>(a.from + t * a.stride + i, power), a.scratch + t * d + i);
      alignas(64) float found[2][S::kLanes];
      S::store(found[0], range.step);
      S::store(found[1], range.zero);
      for (int part = 0; part < 2; ++part)
        for (int l = 0; l < S::kLanes; ++l)
          if (store_scale(found[part][l], power.e, a.tile.scales + (part * kKeyGroups + n) * d + i + l) != kCoded)
            report(status, kScaleOverflow, largest_key(a, first, i + l));
    }
  }
  return status;
}

template <class S, class Codec>
int32_t encode_asymmetric(const kvpack::EncodeArgs& a) {
  return a.side == kvpack::Side::key ? encode_asymmetric_keys<S, Codec>(a) : encode_asymmetric_values<S, Codec>(a);
}

template <class Codec>
void decode_asymmetric(const kvpack::DecodeArgs& a) {
  using namespace kvpack;
  const int d = a.head_dim, zeros = scale_rows_of<Codec>(a.side, d) * kTile / 2;
  unpack_codes<static_cast<int>(2 * Codec::kBits), false>(a.tile.codes, d, a.side, a.scratch);
  for (int t = 0; t < kTile; ++t)
    for (int i = 0; i < d; ++i) {
      const int at = a.side == Side::key ? t / (kTile / kKeyGroups) * d + i : i / Codec::kScaleBlock * kTile + t;
      const float step = half_to_float(a.tile.scales[at]), zero = half_to_float(a.tile.scales[zeros + at]);
      a.x[t * d + i] = zero + step * static_cast<float>(a.scratch[t * d + i]);
    }
}

}  // namespace
