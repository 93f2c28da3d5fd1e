// The projection of residuals (codecs/qjl.h): products with a matrix that lies column by column.
//
// The signs of a projected residual are codes: terms are multiplied, then added, one column after the other, so that
// they are the same on every level.
#pragma once
#include "kernels/blocking.inl.h"
#include "kernels/table.h"

namespace {

// 16 rows of the products of N vectors: every column is loaded once for all of them.
template <class S, int N, class Use>
[[gnu::always_inline]] inline void project_16(const float* columns, const float* x, int d, Use&& use) {
  constexpr int kVectors = 16 / S::kLanes;
  typename S::F sum[N][kVectors];
  for (int n = 0; n < N; ++n)
    for (int v = 0; v < kVectors; ++v) sum[n][v] = S::zero();
  for (int j = 0; j < d; ++j)
    unrolled<N>([&](int n) __attribute__((always_inline)) {
      const auto factor = S::set1(x[n * d + j]);
      for (int v = 0; v < kVectors; ++v)
        sum[n][v] = S::add(sum[n][v], S::mul(S::load(columns + j * d + v * S::kLanes), factor));
    });
  for (int n = 0; n < N; ++n)
    for (int v = 0; v < kVectors; ++v) use(n, v * S::kLanes, sum[n][v]);
}

// G x of `count` vectors [count][d]: use(vector, row, products of kLanes rows). The matrix does not fit into the first
// cache, so that four vectors at a time cost half of what one at a time does.
template <class S, class Use>
[[gnu::always_inline]] inline void project(const float* columns, const float* x, int count, int d, Use&& use) {
  constexpr int kAtOnce = S::kLanes == 1 ? 1 : 4;
  int t = 0;
  for (; t + kAtOnce <= count; t += kAtOnce)
    for (int i = 0; i < d; i += 16)
      project_16<S, kAtOnce>(
          columns + i, x + t * d,
          d, [&](int n, int row, typename S::F y) __attribute__((always_inline)) { use(t + n, i + row, y); });
  for (; t < count; ++t)
    for (int i = 0; i < d; i += 16)
      project_16<S, 1>(
          columns + i, x + t * d,
          d, [&](int, int row, typename S::F y) __attribute__((always_inline)) { use(t, i + row, y); });
}

// out = G x.
template <class S>
void project_one(const float* columns, const float* x, float* out, int32_t d) {
  project<S>(
      columns, x, 1, d, [&](int, int row, typename S::F y) __attribute__((always_inline)) { S::store(out + row, y); });
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
