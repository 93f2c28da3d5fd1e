// What encoders share: the maximum, the power of two that is taken out, sums in a fixed order, fp16 scales, and the
// first phase of every rotated codec: vectors of a tile to the rotated domain, centred if there is a mean.
//
// Codes and scales are bit-identical on every level. So the order of float32 operations is fixed (docs/format.md
// section 5 numbers the steps), nothing is contracted into FMAs, and the caller switches flush-to-zero off.
// Sums run in 16 lanes, multiply then add, and end in the tree l+8, l+4, l+2, l+1.
#pragma once
#include "kernels/fwht.inl.h"
#include "kernels/powers.inl.h"

namespace {

// The status of a tile: that of the first vector that cannot be coded (EncodeArgs).
inline void report(int32_t& status, int32_t outcome, int token) {
  if (outcome != kCoded && status == 0) status = outcome == kNonFinite ? token + 1 : -(token + 1);
}

// The largest |x| by lanes; a NaN stays.
template <class S>
[[gnu::always_inline]] inline typename S::F max_abs_lanes(const float* x, int n) {
  auto max = S::abs(S::load(x));
  for (int i = S::kLanes; i < n; i += S::kLanes) max = S::max_bits(max, S::abs(S::load(x + i)));
  return max;
}
inline bool is_finite(float m) { return float_bits(m) < 0x7f800000U; }
template <class S>
[[gnu::always_inline]] inline float max_abs(const float* x, int n) {
  return S::reduce_max_bits(max_abs_lanes<S>(x, n));
}

// A sum in 16 lanes: product(i) are those of the vector at i.
template <class S, class Product>
[[gnu::always_inline]] inline float lane_sum(int n, Product&& product) {
  constexpr int kParts = 16 / S::kLanes;
  typename S::F part[kParts];
  for (int p = 0; p < kParts; ++p) part[p] = product(p * S::kLanes);
  for (int i = 16; i < n; i += 16)
    for (int p = 0; p < kParts; ++p) part[p] = S::add(part[p], product(i + p * S::kLanes));
  return S::reduce_16(part);
}

// float32(1 / sqrt(d)): from the unnormalised transform to the orthonormal one.
inline float unit_norm(int head_dim) { return static_cast<float>(1.0 / __builtin_sqrt(static_cast<double>(head_dim))); }

// A vector in the rotated domain: y = FWHT(s x 2^-e), not normalised, less the mean if there is one. n2 = |y|^2 / d.
struct Rotated {
  float n2, r;
  int e;
  bool live;  // not all zeros
};

template <class S, int D>
[[gnu::always_inline]] inline void rotate_scaled(const float* x, const PowerOfTwo& power, const float* signs,
                                                 typename S::F (&v)[D / S::kLanes], float* n2) {
  for (int i = 0; i < D / S::kLanes; ++i) v[i] = S::mul(S::load(x + i * S::kLanes), S::set1(power.down));
  if (power.down_again != 1.0F)
    for (int i = 0; i < D / S::kLanes; ++i) v[i] = S::mul(v[i], S::set1(power.down_again));
  if (n2 != nullptr) *n2 = lane_sum<S>(D, [&](int i) { return S::mul(v[i / S::kLanes], v[i / S::kLanes]); });
  for (int i = 0; i < D / S::kLanes; ++i) v[i] = S::mul(v[i], S::load(signs + i * S::kLanes));
  hadamard<S, D>(v);
}

// The rows of the input as their y, in a.x. Without Norm, all of their n2 and r are 1.
template <class S, int D, bool Norm>
int32_t to_rotated(const kvpack::EncodeArgs& a, Rotated* out) {
  using kvpack::kTile;
  constexpr int kVectors = D / S::kLanes;
  int32_t status = 0;
  float top = 0.0F, each[kTile];
  for (int t = 0; t < kTile; ++t) {
    each[t] = max_abs<S>(a.from + t * a.stride, D);
    if (!is_finite(each[t])) report(status, kNonFinite, t);
    top = each[t] > top ? each[t] : top;
  }
  if (status != 0) return status;
  typename S::F v[kVectors];
  if (a.tile.mean == nullptr) {
    for (int t = 0; t < kTile; ++t) {
      if (each[t] == 0.0F) {
        out[t] = {1.0F, 1.0F, 0, false};
        __builtin_memset(a.x + t * D, 0, D * sizeof(float));
        continue;
      }
      const PowerOfTwo power(each[t]);
      float n2 = 1.0F;
      rotate_scaled<S, D>(a.from + t * a.stride, power, a.signs, v, Norm ? &n2 : nullptr);
      for (int i = 0; i < kVectors; ++i) S::store(a.x + t * D + i * S::kLanes, v[i]);
      out[t] = {n2, __builtin_sqrtf(n2), power.e, true};
    }
    return 0;
  }
  const float step = half_to_float(*a.tile.mean_scale), m = top > step ? top : step;
  const PowerOfTwo power(m == 0.0F ? 1.0F : m);
  const float unit = step * power.down * power.down_again * static_cast<float>(__builtin_sqrt(static_cast<double>(D)));
  alignas(64) float mean[D];
  for (int i = 0; i < D; ++i) mean[i] = unit * static_cast<float>(a.tile.mean[i]);
  for (int t = 0; t < kTile; ++t) {
    rotate_scaled<S, D>(a.from + t * a.stride, power, a.signs, v, nullptr);
    for (int i = 0; i < kVectors; ++i) {
      v[i] = S::sub(v[i], S::load(mean + i * S::kLanes));
      S::store(a.x + t * D + i * S::kLanes, v[i]);
    }
    float n2 = 1.0F;
    if constexpr (Norm)
      n2 = lane_sum<S>(D, [&](int i) { return S::mul(v[i / S::kLanes], v[i / S::kLanes]); }) *
           static_cast<float>(1.0 / D);
    out[t] = n2 > 0.0F ? Rotated{n2, __builtin_sqrtf(n2), power.e, true} : Rotated{1.0F, 1.0F, 0, false};
  }
  return 0;
}

// The mean of the vectors of a tile that are not all zeros (padding is), in the rotated domain, as int8 with a scale.
template <class S, int D>
int32_t encode_mean_of(const kvpack::EncodeArgs& a) {
  using kvpack::kTile;
  int32_t status = 0;
  float top = 0.0F;
  int tokens = 0;
  for (int t = 0; t < kTile; ++t) {
    const float m = max_abs<S>(a.from + t * a.stride, D);
    if (!is_finite(m)) report(status, kNonFinite, t);
    top = m > top ? m : top;
    tokens += m > 0.0F ? 1 : 0;
  }
  if (status != 0) return status;
  __builtin_memset(a.tile.mean, 0, D);
  *a.tile.mean_scale = 0;
  if (tokens == 0) return 0;
  const PowerOfTwo power(top);
  typename S::F sum[D / S::kLanes];
  const auto share = S::set1(1.0F / static_cast<float>(tokens));
  for (int i = 0; i < D / S::kLanes; ++i) {
    sum[i] = S::zero();
    for (int t = 0; t < kTile; ++t)
      sum[i] = S::add(sum[i], S::mul(S::mul(S::load(a.from + t * a.stride + i * S::kLanes), S::set1(power.down)),
                                     S::set1(power.down_again)));
    sum[i] = S::mul(S::mul(sum[i], share), S::load(a.signs + i * S::kLanes));
  }
  hadamard<S, D>(sum);
  alignas(64) float y[D];
  for (int i = 0; i < D / S::kLanes; ++i) S::store(y + i * S::kLanes, sum[i]);
  const float peak = max_abs<S>(y, D);
  if (peak < 0x1p-100F) return 0;
  const float step = peak / 127.0F, inv = 1.0F / step;
  for (int i = 0; i < D; ++i) a.tile.mean[i] = static_cast<int8_t>(__builtin_nearbyintf(y[i] * inv));
  if (store_scale(step * unit_norm(D), power.e, a.tile.mean_scale) != kCoded) status = -1;
  return status;
}

template <class S>
int32_t encode_mean(const kvpack::EncodeArgs& a) {
  return for_head_dim(a.head_dim, [&]<int D>() { return encode_mean_of<S, D>(a); });
}

}  // namespace
