// The projection of residuals (codecs/qjl.h): products with a matrix that lies column by column.
//
// The signs of a projected residual are codes: terms are multiplied, then added, one column after the other, so that
// they are the same on every level.
#pragma once
#include "kernels/table.h"

namespace {

// Rows [first, first + N): sums stay in registers, or nearly so, and enough of them are in flight.
template <class S, int N>
[[gnu::always_inline]] inline void project_rows(const float* columns, const float* x, float* out, int d) {
  constexpr int kVectors = N / S::kLanes;
  typename S::F sum[kVectors];
  for (int v = 0; v < kVectors; ++v) sum[v] = S::zero();
  for (int j = 0; j < d; ++j) {
    const auto factor = S::set1(x[j]);
    for (int v = 0; v < kVectors; ++v)
      sum[v] = S::add(sum[v], S::mul(S::load(columns + j * d + v * S::kLanes), factor));
  }
  for (int v = 0; v < kVectors; ++v) S::store(out + v * S::kLanes, sum[v]);
}

// out = G x.
template <class S>
void project(const float* columns, const float* x, float* out, int32_t d) {
  int i = 0;
  for (; i + 64 <= d; i += 64) project_rows<S, 64>(columns + i, x, out + i, d);
  for (; i < d; i += 16) project_rows<S, 16>(columns + i, x, out + i, d);
}

// out += G^T x; decoding is not exact to the bit.
template <class S>
void project_back(const float* columns, const float* x, float* out, int32_t d) {
  for (int j = 0; j < d; ++j) {
    auto sum = S::zero();
    for (int i = 0; i < d; i += S::kLanes) sum = S::fma(S::load(columns + j * d + i), S::load(x + i), sum);
    out[j] += S::reduce_add(sum);
  }
}

}  // namespace
