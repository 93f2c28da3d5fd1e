// The mean that centring has taken from the keys or values of a tile, given back: never per token.
//
// Keys: softmax would not notice a constant, but exact keys stand beside the packed ones, so query . mean is added to
// the scores of the tile, which the softmax kernel does. Values: the mean enters with the probability of all the tiles
// in a row that share it. Both in the rotated domain. Zen 4, AVX-512, d = 128, four rows: 13 ns a tile and 13 ns a
// mean.
#pragma once
#include "kernels/blocking.inl.h"
#include "kernels/table.h"

namespace {

// Rows side by side, so that reductions overlap.
template <class S, int G>
void score_mean_rows(const kvpack::MeanArgs& a) {
  typename S::F dot[4] = {S::zero(), S::zero(), S::zero(), S::zero()};
  for (int i = 0; i < a.head_dim; i += S::kLanes) {
    const auto mean = S::load_int8(a.mean + i);
    unrolled<G>([&](int g) __attribute__((always_inline)) {
      dot[g] = S::fma(S::load(a.query + static_cast<ptrdiff_t>(g) * a.stride + i), mean, dot[g]);
    });
  }
  float sum[4];
  S::reduce_add_4(dot[0], dot[1], dot[2], dot[3], sum);
  for (int g = 0; g < G; ++g) a.bias[g] = a.scale * sum[g];
}

template <class S>
void score_mean(const kvpack::MeanArgs& a) {
  switch (a.group) {
    case 1: return score_mean_rows<S, 1>(a);
    case 2: return score_mean_rows<S, 2>(a);
    case 3: return score_mean_rows<S, 3>(a);
    default: return score_mean_rows<S, 4>(a);
  }
}

template <class S>
void accumulate_mean(const kvpack::MeanArgs& a) {
  for (int g = 0; g < a.group; ++g) {
    float* out = a.out + static_cast<ptrdiff_t>(g) * a.stride;
    const auto mass = S::set1(a.scale * a.rows[g].pending);
    for (int i = 0; i < a.head_dim; i += S::kLanes)
      S::store(out + i, S::fma(S::load_int8(a.mean + i), mass, S::load(out + i)));
    a.rows[g].pending = 0.0F;
  }
}

}  // namespace
