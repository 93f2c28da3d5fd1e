// Decoders: packed lines to head vectors, in the original domain. Not on the fused read path, which never leaves the
// packed domain; serves eager attention, snapshots, tests.
#pragma once
#include "kernels/fwht.inl.h"
#include "kernels/pack.inl.h"
#include "simd/half.h"

namespace {

template <class S, class Codec>
void decode(const kvpack::DecodeArgs& a) {
  using kvpack::kTile;
  unpack_codes<Codec::kBits>(a.tile.codes, a.head_dim, a.side, a.scratch);
  const int blocks = kvpack::scale_blocks(Codec::kScaleBlock, Codec::kBits, a.head_dim);
  const int block = Codec::kScaleBlock == 0 ? a.head_dim : Codec::kScaleBlock;
  constexpr kvpack::LevelTable levels = Codec::kLevels;
  float level[256];
  for (int c = 0; c < 1 << Codec::kBits; ++c)
    level[c] = Codec::kBits == 8 ? static_cast<float>(c - 128) : static_cast<float>(levels.level[c & 15]);
  for (int t = 0; t < kTile; ++t)
    for (int b = 0; b < blocks; ++b) {
      const float scale = half_to_float(a.tile.scales[b * kTile + t]);
      const int at = t * a.head_dim, end = (b + 1) * block < a.head_dim ? (b + 1) * block : a.head_dim;
      for (int i = b * block; i < end; ++i) a.x[at + i] = scale * level[a.scratch[at + i]];
    }
  if constexpr (Codec::kRotated) rotate<S>(a.x, kTile, a.head_dim, a.signs, true);
}

}  // namespace
