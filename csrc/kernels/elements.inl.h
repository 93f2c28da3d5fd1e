// Codes that are e4m3 floats with one scale per vector: encode and decode. They lie as the elements of `exact`: keys
// [dim][64 tokens], values [64 tokens][dim]. Steps as in docs/format.md section 5.
#pragma once
#include "kernels/encode_steps.inl.h"

namespace {

// 16 rows of 16 bytes, transposed: four times, the rows of one half are interleaved with those of the other.
inline void transpose_16x16(const uint8_t* from, ptrdiff_t stride, uint8_t* to, ptrdiff_t to_stride) {
  using V = uint8_t __attribute__((vector_size(16), aligned(1)));
  V r[16], s[16];
  for (int i = 0; i < 16; ++i) __builtin_memcpy(&r[i], from + i * stride, sizeof r[i]);
  for (int stage = 0; stage < 4; ++stage) {
    for (int i = 0; i < 8; ++i) {
      s[2 * i] = __builtin_shufflevector(r[i], r[i + 8], 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
      s[2 * i + 1] =
          __builtin_shufflevector(r[i], r[i + 8], 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
    }
    for (int i = 0; i < 16; ++i) r[i] = s[i];
  }
  for (int i = 0; i < 16; ++i) __builtin_memcpy(to + i * to_stride, &r[i], sizeof r[i]);
}

template <class S>
int32_t encode_elements(const kvpack::EncodeArgs& a) {
  using namespace kvpack;
  const int d = a.head_dim;
  alignas(64) float y[kMaxHeadDim];
  int32_t status = 0;
  for (int t = 0; t < kTile; ++t) {
    const float* x = a.from + t * a.stride;
    uint8_t* codes = a.scratch + t * d;
    const float m = max_abs<S>(x, d);
    if (!is_finite(m) || m == 0.0F) {
      if (m != 0.0F) report(status, kNonFinite, t);
      for (int i = 0; i < d; ++i) codes[i] = 0;
      a.tile.scales[t] = 0;
      continue;
    }
    const PowerOfTwo power(m);
    const float step = m * power.down * power.down_again / 448.0F, inv = 1.0F / step;
    for (int i = 0; i < d; i += S::kLanes) {
      const auto v = S::mul(S::mul(S::load(x + i), S::set1(power.down)), S::set1(power.down_again));
      S::store(y + i, S::mul(v, S::set1(inv)));
    }
    for (int i = 0; i < d; ++i) codes[i] = float_to_e4m3(y[i]);
    report(status, store_scale(step, power.e, a.tile.scales + t), t);
  }
  if (a.side == Side::value) {
    __builtin_memcpy(a.tile.codes, a.scratch, static_cast<size_t>(kTile * d));
    return status;
  }
  for (int i = 0; i < d; i += 16)
    for (int t = 0; t < kTile; t += 16) transpose_16x16(a.scratch + t * d + i, d, a.tile.codes + i * kTile + t, kTile);
  return status;
}

inline void decode_elements(const kvpack::DecodeArgs& a) {
  using namespace kvpack;
  const int d = a.head_dim, token = a.side == Side::key ? 1 : d, dim = a.side == Side::key ? kTile : 1;
  for (int t = 0; t < kTile; ++t) {
    const float scale = half_to_float(a.tile.scales[t]);
    for (int i = 0; i < d; ++i)
      a.x[t * d + i] = scale * (half_to_float(e4m3_to_half(a.tile.codes[t * token + i * dim])) * kE4m3Unit);
  }
}

}  // namespace
