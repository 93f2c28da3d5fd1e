// Codes that are e4m3 floats with one scale per vector: encode and decode. They lie as the elements of `exact`: keys
// [dim][64 tokens], values [64 tokens][dim]. Steps as in docs/format.md section 5.
#pragma once
#include "kernels/encode_steps.inl.h"

namespace {

template <class S>
int32_t encode_elements(const kvpack::EncodeArgs& a) {
  using namespace kvpack;
  const int d = a.head_dim;
  int32_t status = 0;
  for (int t = 0; t < kTile; ++t) {
    const float* x = a.from + t * a.stride;
    uint8_t* codes = a.scratch + t * d;
    bool finite;
    const float m = max_abs<S>(x, d, finite);
    if (!finite || m == 0.0F) {
      if (!finite) report(status, kNonFinite, t);
      for (int i = 0; i < d; ++i) codes[i] = 0;
      a.tile.scales[t] = 0;
      continue;
    }
    const PowerOfTwo power(m);
    const float step = m * power.down * power.down_again / 448.0F, inv = 1.0F / step;
    for (int i = 0; i < d; ++i) codes[i] = float_to_e4m3(x[i] * power.down * power.down_again * inv);
    report(status, store_scale(step, power.e, a.tile.scales + t), t);
  }
  if (a.side == Side::value) {
    __builtin_memcpy(a.tile.codes, a.scratch, static_cast<size_t>(kTile * d));
    return status;
  }
  for (int i = 0; i < d; ++i)
    for (int t = 0; t < kTile; ++t) a.tile.codes[i * kTile + t] = a.scratch[t * d + i];
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
