// Encoders: head vectors to codes and fp16 scales, then packed lines.
//
// Codes and scales are bit-identical on every level. So the order of float32 operations is fixed (the steps are
// numbered as in reference/quantize.py), nothing is contracted into FMAs, and the caller switches flush-to-zero off.
// Sums run in 16 lanes, multiply then add, and end in the tree l+8, l+4, l+2, l+1.
#pragma once
#include "kernels/fwht.inl.h"
#include "kernels/pack.inl.h"
#include "simd/half.h"

namespace {

// What an encoder reports for a vector: 0, or the reason why it cannot be coded.
enum : int32_t { kCoded = 0, kNonFinite = 1, kScaleOverflow = 2 };

template <class S>
float max_abs(const float* x, int n, bool& finite) {
  typename S::F max = S::zero(), check = S::zero();
  for (int i = 0; i < n; i += S::kLanes) {
    const auto v = S::load(x + i);
    max = S::max(S::abs(v), max);
    check = S::fma(v, S::zero(), check);  // NaN as soon as one element is not finite
  }
  finite = S::reduce_add(check) == 0.0F;
  return S::reduce_max(max);
}

// 2^-e with 2^e <= m < 2^(e+1), as two factors: the second is needed where 2^-e exceeds the float range.
struct PowerOfTwo {
  int e;
  float down, down_again;
  explicit PowerOfTwo(float m) {
    int exponent;
    __builtin_frexpf(m, &exponent);
    e = exponent - 1;
    down = __builtin_ldexpf(1.0F, e < -127 ? 127 : -e);
    down_again = e < -127 ? __builtin_ldexpf(1.0F, -e - 127) : 1.0F;
  }
};

// Step 8: scale * 2^e in fp16.
inline int32_t store_scale(float scale, int e, uint16_t* out) {
  const uint16_t half = float_to_half(__builtin_ldexpf(scale, e));
  *out = half;
  return (half & 0x7c00U) == 0x7c00U ? kScaleOverflow : kCoded;
}

template <class S>
struct LaneSum {
  static constexpr int kParts = 16 / S::kLanes;
  typename S::F part[kParts];
  void start(int i, typename S::F product) { part[i] = product; }
  void next(int i, typename S::F product) { part[i] = S::add(part[i], product); }
  float total() const {
    alignas(64) float l[16];
    for (int i = 0; i < kParts; ++i) S::store(l + i * S::kLanes, part[i]);
    for (int step = 8; step >= 1; step /= 2)
      for (int i = 0; i < step; ++i) l[i] = l[i] + l[i + step];
    return l[0];
  }
  template <int D, class Product>
  static float over(Product&& product) {
    LaneSum sum;
    for (int i = 0; i < D / S::kLanes; ++i) i < kParts ? sum.start(i, product(i)) : sum.next(i % kParts, product(i));
    return sum.total();
  }
};

inline float scale_of(kvpack::Rule rule, float r, float n2, float xc, int32_t cc, double unit, int head_dim) {
  const double root = __builtin_sqrt(static_cast<double>(head_dim));
  const auto norm = static_cast<float>(1.0 / root);
  switch (rule) {
    case kvpack::Rule::stored: return r * static_cast<float>(unit / root);
    case kvpack::Rule::norm: return r / __builtin_sqrtf(static_cast<float>(cc));
    case kvpack::Rule::mse: return (xc * norm) / static_cast<float>(cc);
    default: return n2 / (xc * norm);
  }
}

template <class S, class Codec, int D>
int32_t encode_rotated(const float* x, const float* signs, kvpack::Rule rule, uint8_t* codes, uint16_t* scale) {
  using F = typename S::F;
  constexpr int kVectors = D / S::kLanes, kHalf = 1 << (Codec::kBits - 1);
  static constexpr kvpack::LevelTable kLevels = Codec::kLevels;
  bool finite;
  const float m = max_abs<S>(x, D, finite);  // 1
  if (!finite) return kNonFinite;
  if (m == 0.0F) {
    __builtin_memset(codes, kHalf, D);
    *scale = 0;
    return kCoded;
  }
  const PowerOfTwo power(m);  // 2
  F v[kVectors];
  for (int i = 0; i < kVectors; ++i)
    v[i] = S::mul(S::mul(S::load(x + i * S::kLanes), S::set1(power.down)), S::set1(power.down_again));
  const float n2 = LaneSum<S>::template over<D>([&](int i) { return S::mul(v[i], v[i]); });  // 3
  const float r = __builtin_sqrtf(n2);
  for (int i = 0; i < kVectors; ++i) v[i] = S::mul(v[i], S::load(signs + i * S::kLanes));  // 4
  hadamard<S, D>(v);
  const F inv = S::set1(1.0F / r);  // 5
  F q[kVectors], square = S::zero();
  for (int i = 0; i < kVectors; ++i) {
    const F z = S::mul(v[i], inv), a = S::abs(z);
    F magnitude = S::set1(0.5F), level = S::set1(kLevels.level[kHalf]);
    for (int k = 1; k < kHalf; ++k) {
      const F t = S::set1(kvpack::threshold<Codec>(k));
      magnitude = S::add_where_greater(magnitude, a, t, S::set1(1.0F));
      level = S::add_where_greater(
          level, a, t, S::set1(static_cast<float>(kLevels.level[kHalf + k] - kLevels.level[kHalf + k - 1])));
    }
    // kHalf + mag above zero, kHalf - 1 - mag below: one expression in mag + 1/2.
    S::store_low_bytes(codes + i * S::kLanes,
                       S::add(S::set1(static_cast<float>(kHalf) - 0.5F), S::copy_sign(magnitude, z)));
    square = S::fma(level, level, square);  // exact: integers below 2^24
    q[i] = S::copy_sign(level, z);          // 6
  }
  const auto cc = static_cast<int32_t>(S::reduce_add(square));
  const bool projects = rule == kvpack::Rule::mse || rule == kvpack::Rule::unbiased;
  const float xc = projects ? LaneSum<S>::template over<D>([&](int i) { return S::mul(v[i], q[i]); }) : 0.0F;
  return store_scale(scale_of(rule, r, n2, xc, cc, Codec::kUnit, D), power.e, scale);  // 7, 8
}

// ggml's block formats; the last block may be shorter. Scaling by a power of two first changes nothing but the range.
template <class S, class Codec>
int32_t encode_block(const float* x, int values, uint8_t* codes, uint16_t* scale) {
  using F = typename S::F;
  constexpr bool kByte = Codec::kBits == 8;
  bool finite;
  const float m = max_abs<S>(x, values, finite);
  if (!finite) return kNonFinite;
  if (m == 0.0F) {
    __builtin_memset(codes, kByte ? 128 : 8, static_cast<size_t>(values));
    *scale = 0;
    return kCoded;
  }
  const PowerOfTwo power(m);
  float extreme = m;
  if constexpr (!kByte)
    for (int i = 0; i < values; ++i)
      if (__builtin_fabsf(x[i]) == m) {
        extreme = x[i];
        break;
      }
  const float step = extreme * power.down * power.down_again / (kByte ? 127.0F : -8.0F), inv = 1.0F / step;
  for (int i = 0; i < values; i += S::kLanes) {
    const F v = S::mul(S::mul(S::load(x + i), S::set1(power.down)), S::set1(power.down_again));
    const F y = S::mul(v, S::set1(inv));
    if constexpr (kByte)
      S::store_low_bytes(codes + i, S::add(S::round_even(y), S::set1(128.0F)));
    else
      S::store_low_bytes(codes + i, S::min(S::truncate(S::add(y, S::set1(8.5F))), S::set1(15.0F)));
  }
  return store_scale(step, power.e, scale);
}

template <class S, class Codec>
int32_t encode(const kvpack::EncodeArgs& a) {
  using kvpack::kTile;
  const int blocks = kvpack::scale_blocks(Codec::kScaleBlock, Codec::kBits, a.head_dim);
  int32_t status = 0;
  const auto report = [&status](int32_t outcome, int token) {
    if (outcome != kCoded && status == 0) status = outcome == kNonFinite ? token + 1 : -(token + 1);
  };
  if constexpr (Codec::kRotated) {
    for_head_dim(a.head_dim, [&]<int D>() {
      for (int t = 0; t < kTile; ++t)
        report(encode_rotated<S, Codec, D>(a.x + t * D, a.signs, a.rule, a.scratch + t * D, a.tile.scales + t), t);
    });
  } else {
    for (int t = 0; t < kTile; ++t)
      for (int b = 0; b < blocks; ++b) {
        const int first = b * Codec::kScaleBlock, at = t * a.head_dim + first;
        const int values = a.head_dim - first < Codec::kScaleBlock ? a.head_dim - first : Codec::kScaleBlock;
        report(encode_block<S, Codec>(a.x + at, values, a.scratch + at, a.tile.scales + b * kTile + t), t);
      }
  }
  if (status == 0) pack_codes<Codec::kBits>(a.scratch, a.head_dim, a.side, a.tile.codes);
  return status;
}

}  // namespace
