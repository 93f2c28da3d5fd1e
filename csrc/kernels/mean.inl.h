// The mean that centring has taken from the keys or values of a tile, given back: once per tile, not per token.
//
// Keys: softmax would not notice a constant, but exact keys stand beside the packed ones, so query . mean is added to
// the scores of the tile. Values: the mean enters with the probability mass of the tile. Both in the rotated domain.
#pragma once
#include "kernels/table.h"

namespace {

template <class S>
void widen_mean(const kvpack::MeanArgs& a, float* mean) {
  for (int i = 0; i < a.head_dim; ++i) mean[i] = a.scale * static_cast<float>(a.mean[i]);
}

template <class S>
void score_mean(const kvpack::MeanArgs& a) {
  using kvpack::kTile;
  alignas(64) float mean[kvpack::kMaxHeadDim];
  widen_mean<S>(a, mean);
  for (int g = 0; g < a.group; ++g) {
    const float* query = a.query + static_cast<ptrdiff_t>(g) * a.stride;
    auto dot = S::zero();
    for (int i = 0; i < a.head_dim; i += S::kLanes) dot = S::fma(S::load(query + i), S::load(mean + i), dot);
    const auto bias = S::set1(S::reduce_add(dot));
    float* scores = a.scores + g * kTile;
    for (int t = 0; t < kTile; t += S::kLanes) S::store(scores + t, S::add(S::load(scores + t), bias));
  }
}

template <class S>
void accumulate_mean(const kvpack::MeanArgs& a) {
  using kvpack::kTile;
  alignas(64) float mean[kvpack::kMaxHeadDim];
  widen_mean<S>(a, mean);
  for (int g = 0; g < a.group; ++g) {
    auto sum = S::zero();
    for (int t = 0; t < kTile; t += S::kLanes) sum = S::add(sum, S::load(a.scores + g * kTile + t));
    const auto mass = S::set1(S::reduce_add(sum));
    float* out = a.out + static_cast<ptrdiff_t>(g) * a.stride;
    for (int i = 0; i < a.head_dim; i += S::kLanes)
      S::store(out + i, S::fma(S::load(mean + i), mass, S::load(out + i)));
  }
}

}  // namespace
