// The channels of a split codec's parts (codecs/split.h), side by side.
#pragma once
#include "kernels/table.h"

namespace {

// The lanes whose bits are set, at `to` and up; what lies behind them, as far as a vector goes, may be overwritten.
template <class S>
[[gnu::always_inline]] inline void compress_lanes(const float* from, uint32_t mask, float* to) {
  if constexpr (requires { S::compress(to, S::load(from), mask); }) {
    S::compress(to, S::load(from), mask);
  } else {
    for (int i = 0; i < S::kLanes; ++i) {
      *to = from[i];
      to += mask >> i & 1;
    }
  }
}

// Of every row, the channels whose bits in the map are `outlier`.
template <class S>
void gather(const kvpack::GatherArgs& a) {
  uint32_t masks[kvpack::kMaxHeadDim / S::kLanes];
  const uint32_t flip = a.outliers ? 0 : ~0U;
  for (int i = 0; i < a.head_dim; i += S::kLanes) {
    uint32_t bits = a.map[i / 8];
    if constexpr (S::kLanes == 16) bits |= static_cast<uint32_t>(a.map[i / 8 + 1]) << 8;
    masks[i / S::kLanes] = (bits >> i % 8 ^ flip) & ((1U << S::kLanes) - 1);
  }
  for (int t = 0; t < kvpack::kTile; ++t) {
    const float* from = a.from + t * a.stride;
    float* to = a.to + t * a.dims;
    for (int i = 0; i < a.head_dim; i += S::kLanes) {
      const uint32_t mask = masks[i / S::kLanes];
      compress_lanes<S>(from + i, mask, to);
      to += __builtin_popcount(mask);
    }
  }
}

}  // namespace
