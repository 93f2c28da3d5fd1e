// Exact tokens as rows of elements: window, sinks, the call's own tokens; also the values of an `exact` tile.
//
// score: one token against four query rows, four dot products side by side, reduced together.
// accumulate: outputs stay in registers over the tokens of a block, 64 dims at a time.
#pragma once
#include "kernels/blocking.inl.h"
#include "kernels/table.h"
#include "simd/half.h"

namespace {

template <class S, kvpack::Dtype T, int G>
void dense_score_group(const kvpack::DenseArgs& a) {
  using namespace kvpack;
  using F = typename S::F;
  constexpr int kBytes = dtype_bytes(T);
  for (int t = 0; t < a.tokens; ++t) {
    const uint8_t* row = a.rows + t * a.stride;
    F acc[4];
    for (int g = 0; g < 4; ++g) acc[g] = S::zero();
    for (int i = 0; i < a.head_dim; i += S::kLanes) {
      const F key = S::template load_element<T>(row + i * kBytes);
      unrolled<G>([&](int g) __attribute__((always_inline)) {
        acc[g] = S::fma(key, S::load(a.query + g * a.head_dim + i), acc[g]);
      });
    }
    float sum[4];
    S::reduce_add_4(acc[0], acc[1], acc[2], acc[3], sum);
    for (int g = 0; g < G; ++g) a.probs[g * kTile + t] = sum[g];
  }
  for (int g = 0; g < G; ++g)
    for (int t = a.tokens; t < kTile; ++t) a.probs[g * kTile + t] = -__builtin_inff();
}

// Whole groups of kInFlight vectors from dim `first` on. Masked: tokens of probability 0 may hold anything, NaN
// included, and are not read. Tiles are of numbers, and a test for each token would take a third of the time (AVX2,
// fp8).
template <class S, kvpack::Dtype T, int G, int kInFlight, bool Masked>
[[gnu::noinline]] void dense_accumulate_dims(const kvpack::DenseArgs& a, int first) {
  using namespace kvpack;
  using F = typename S::F;
  constexpr int kBytes = dtype_bytes(T), kDims = kInFlight * S::kLanes;
  for (int i = first; i + kDims <= a.head_dim; i += kDims) {
    F acc[G][kInFlight];
    for (int g = 0; g < G; ++g)
      for (int v = 0; v < kInFlight; ++v)
        acc[g][v] = S::load(a.out + static_cast<ptrdiff_t>(g) * a.out_stride + i + v * S::kLanes);
#pragma GCC unroll 1
    for (int t = 0; t < a.tokens; ++t) {
      if constexpr (Masked) {
        float weight = 0.0F;
        for (int g = 0; g < G; ++g) weight += a.probs[g * kTile + t];
        if (weight == 0.0F) continue;
      }
      const uint8_t* p = a.rows + t * a.stride + i * kBytes;
      if (a.ahead != nullptr)
        for (int n = 0; n < kDims * kBytes; n += kLine) S::prefetch(a.ahead + t * a.stride + i * kBytes + n);
      F value[kInFlight];
      load_elements<S, T>(p, value);
      unrolled<G>([&](int g) __attribute__((always_inline)) {
        const F w = S::set1(a.probs[g * kTile + t]);
        unrolled<kInFlight>([&](int v) __attribute__((always_inline)) { acc[g][v] = S::fma(value[v], w, acc[g][v]); });
      });
    }
    for (int g = 0; g < G; ++g)
      for (int v = 0; v < kInFlight; ++v)
        S::store(a.out + static_cast<ptrdiff_t>(g) * a.out_stride + i + v * S::kLanes, acc[g][v]);
  }
}

// Head sizes are multiples of 16: where that leaves vectors that do not fill a group, smaller groups take them.
template <class S, kvpack::Dtype T, int G, bool Masked>
void dense_accumulate_group(const kvpack::DenseArgs& a) {
  constexpr int kInFlight = vectors_in_flight<S>(G), kDims = kInFlight * S::kLanes;
  dense_accumulate_dims<S, T, G, kInFlight, Masked>(a, 0);
  if constexpr (kDims > 16) {
    constexpr int kFewer = 16 / S::kLanes;
    if (a.head_dim % kDims != 0) dense_accumulate_dims<S, T, G, kFewer, Masked>(a, a.head_dim / kDims * kDims);
  }
}

// Values of an e4m3 tile: the token scales go into the probabilities.
template <class S, int G>
void accumulate_floats(const kvpack::AccumulateArgs& a) {
  using namespace kvpack;
  alignas(64) float probs[G * kTile];
  for (int t = 0; t < kTile; t += S::kLanes) {
    const auto scale = S::mul(load_scales<S>(a.tile.scales + t), S::set1(kE4m3Unit));
    for (int g = 0; g < G; ++g) S::store(probs + g * kTile + t, S::mul(S::load(a.probs + g * kTile + t), scale));
  }
  dense_accumulate_group<S, Dtype::e4m3, G, false>(
      {a.tile.codes, a.head_dim, nullptr, probs, a.ahead, a.out, a.out_stride, a.head_dim, kTile, G});
}

template <class S, kvpack::Dtype T>
void dense_score(const kvpack::DenseArgs& a) {
  switch (a.group) {
    case 1: return dense_score_group<S, T, 1>(a);
    case 2: return dense_score_group<S, T, 2>(a);
    case 3: return dense_score_group<S, T, 3>(a);
    default: return dense_score_group<S, T, 4>(a);
  }
}

template <class S, kvpack::Dtype T>
void dense_accumulate(const kvpack::DenseArgs& a) {
  switch (a.group) {
    case 1: return dense_accumulate_group<S, T, 1, true>(a);
    case 2: return dense_accumulate_group<S, T, 2, true>(a);
    case 3: return dense_accumulate_group<S, T, 3, true>(a);
    default: return dense_accumulate_group<S, T, 4, true>(a);
  }
}

}  // namespace
