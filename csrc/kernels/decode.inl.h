// Decoders: packed lines to head vectors, in the original domain. Not on the fused read path, which never leaves the
// packed domain; serves eager attention, snapshots, tests.
#pragma once
#include "kernels/asymmetric.inl.h"
#include "kernels/elements.inl.h"
#include "kernels/fwht.inl.h"
#include "kernels/pack.inl.h"
#include "kernels/project.inl.h"
#include "simd/half.h"

namespace {

// Codes [token][dim] to levels, in place (as int8).
template <class Codec>
void codes_to_levels(uint8_t* codes, int head_dim, kvpack::Side side) {
  using namespace kvpack;
  if constexpr (Codec::kTrellis) {
    const bool key = side == Side::key;
    const int steps = key ? head_dim : kTile, lanes = key ? kTile : head_dim;
    const int token = key ? 1 : head_dim, lane = key ? head_dim : 1;  // strides of depth and lane
    for (int l = 0; l < lanes; ++l) {
      uint8_t* sequence = codes + l * lane;
      uint32_t window = 0;
      for (int n = steps - 9; n < steps; ++n)
        window = next_window<typename Codec::Code>(window, sequence[trellis_depth(n, steps) * token], n);
      for (int n = 0; n < steps; ++n) {
        uint8_t& at = sequence[trellis_depth(n, steps) * token];
        window = next_window<typename Codec::Code>(window, at, n);
        at = static_cast<uint8_t>(window_level<typename Codec::Code>(window, n));
      }
    }
  } else {
    constexpr LevelTable levels = Codec::kLevels;
    constexpr bool kTable = Codec::kBits <= 4;
    for (int i = 0; i < kTile * head_dim; ++i)
      codes[i] = static_cast<uint8_t>(kTable ? levels.level[codes[i] & 15] : codes[i] - (1 << (Codec::kBits - 1)));
  }
}

// Values of a tile, in the codec's domain, without their mean.
template <class Codec>
void decode_values(const kvpack::DecodeArgs& a) {
  using kvpack::kTile;
  unpack_codes<static_cast<int>(2 * Codec::kBits), Codec::kTrellis>(a.tile.codes, a.head_dim, a.side, a.scratch);
  codes_to_levels<Codec>(a.scratch, a.head_dim, a.side);
  const int blocks = kvpack::scale_blocks(Codec::kScaleBlock, Codec::kBits, a.head_dim);
  const int block = Codec::kScaleBlock == 0 ? a.head_dim : Codec::kScaleBlock;
  for (int t = 0; t < kTile; ++t)
    for (int b = 0; b < blocks; ++b) {
      const float scale = half_to_float(a.tile.scales[b * kTile + t]);
      for (int i = b * block; i < (b + 1) * block && i < a.head_dim; ++i)
        a.x[t * a.head_dim + i] = scale * static_cast<float>(static_cast<int8_t>(a.scratch[t * a.head_dim + i]));
    }
}

// The decoded residuals, on top of the values of the first part.
template <class S, class Codec>
void add_residuals(const kvpack::DecodeArgs& a) {
  using namespace kvpack;
  const int d = a.head_dim;
  unpack_codes<2, false>(a.tile.codes + code_bytes_of<typename Codec::First>(d), d, a.side, a.scratch);
  alignas(64) float signs[kMaxHeadDim];
  for (int t = 0; t < kTile; ++t) {
    const float size = half_to_float(a.tile.scales[kTile + t]) * a.projection->worth;
    for (int i = 0; i < d; ++i) signs[i] = a.scratch[t * d + i] != 0 ? size : -size;
    project_back<S>(a.projection->columns, signs, a.x + t * d, d);
  }
}

// Levels times scales, plus the mean.
template <class S, class Codec>
void decode_levels(const kvpack::DecodeArgs& a) {
  using kvpack::kTile;
  if constexpr (Codec::kProjected) {
    decode_values<typename Codec::First>(a);
    add_residuals<S, Codec>(a);
  } else {
    decode_values<Codec>(a);
  }
  if (a.tile.mean != nullptr) {
    const float step = half_to_float(*a.tile.mean_scale);
    for (int t = 0; t < kTile; ++t)
      for (int i = 0; i < a.head_dim; ++i) a.x[t * a.head_dim + i] += step * static_cast<float>(a.tile.mean[i]);
  }
  if constexpr (Codec::kRotated) rotate<S>(a.x, kTile, a.head_dim, a.signs, true);
}

template <class S, class Codec>
void decode(const kvpack::DecodeArgs& a) {
  if constexpr (Codec::kElements)
    decode_elements(a);
  else if constexpr (Codec::kAsymmetric)
    decode_asymmetric<Codec>(a);
  else
    decode_levels<S, Codec>(a);
}

}  // namespace
