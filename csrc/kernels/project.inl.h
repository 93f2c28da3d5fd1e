// The projection of residuals (codecs/qjl.h): products with a matrix of int8. Those of queries are floats, with the
// matrix column by column; those of residuals are integers, of which the signs are the codes.
//
// A residual is quantized to int8 for that: its direction turns by less than .01, next to the pi/2 that its signs are
// off, and a product takes a quarter of the time of one in floats, and is the same on every level without a prescribed
// order. Overflow: 256 dims * 255 * 127 = 8.3e6 < 2^31; pairs of AVX2: 2 * 127 * 127 < 2^15.
#pragma once
#include "kernels/blocking.inl.h"
#include "kernels/table.h"
#include "kernels/unpack.inl.h"

namespace {

// G x of a query.
template <class S>
void project(const float* columns, const float* x, float* out, int32_t d) {
  constexpr int kVectors = 16 / S::kLanes;
  for (int i = 0; i < d; i += 16) {
    typename S::F sum[kVectors];
    for (int v = 0; v < kVectors; ++v) sum[v] = S::zero();
    for (int j = 0; j < d; ++j)
      for (int v = 0; v < kVectors; ++v)
        sum[v] = S::fma(S::load(columns + j * d + i + v * S::kLanes), S::set1(x[j]), sum[v]);
    for (int v = 0; v < kVectors; ++v) S::store(out + i + v * S::kLanes, sum[v]);
  }
}

// out += G^T x.
template <class S>
void project_back(const float* columns, const float* x, float* out, int32_t d) {
  for (int j = 0; j < d; ++j) {
    auto sum = S::zero();
    for (int i = 0; i < d; i += S::kLanes) sum = S::fma(S::load(columns + j * d + i), S::load(x + i), sum);
    out[j] += S::reduce_add(sum);
  }
}

// Quantized residuals, as operands of integer products.
struct QuantizedResiduals {
  int32_t operand[kvpack::kTile][kvpack::kMaxHeadDim / 4];
  int32_t offset[kvpack::kTile];  // initial accumulators: undo the key offset
};

// Row t: x times 127 / top, rounded. top: the largest |x|; zeros where there is none to speak of.
template <class S>
[[gnu::always_inline]] inline void quantize_residual(const float* x, float top, int d, int t, QuantizedResiduals& out) {
  const auto inv = S::set1(top < 0x1p-100F ? 0.0F : 127.0F / top);
  auto sum = S::zero();
  for (int i = 0; i < d; i += S::kLanes) {
    const auto level = S::round_even(S::mul(S::load(x + i), inv));
    S::store_operand(out.operand[t], i, level);
    sum = S::add(sum, level);
  }
  out.offset[t] = S::kKeyOffset == 0 ? 0 : -S::kKeyOffset * static_cast<int>(S::reduce_add(sum));
}

// signs [kTile][d]: 1 where the product with a row of the matrix is not negative, else 0. lines: the rows as keys of 8
// bits. Every vector of the matrix meets four residuals.
template <class S>
void project_signs(const uint8_t* lines, const QuantizedResiduals& x, int d, uint8_t* signs) {
  using kvpack::kLine;
  constexpr int kAtOnce = 4, kVectors = 16 / S::kLanes, kInFlight = kVectors < 2 ? kVectors : 2;
  const Unpacker<S, kvpack::Q8_0, kvpack::Side::key> unpack;
  for (int t = 0; t < kvpack::kTile; t += kAtOnce)
    for (int i = 0; i < d; i += 16)
      for (int v0 = 0; v0 < kVectors; v0 += kInFlight) {
        const int row = i + v0 * S::kLanes;
        typename S::I acc[kAtOnce][kInFlight];
        for (int n = 0; n < kAtOnce; ++n)
          for (int v = 0; v < kInFlight; ++v) acc[n][v] = S::splat(x.offset[t + n]);
        for (int j = 0; j < d / 4; ++j)
          unrolled<kInFlight>([&](int v) __attribute__((always_inline)) {
            typename decltype(unpack)::Carry none;
            const auto raw = unpack.load(
                lines + (static_cast<ptrdiff_t>(i / 16) * (d / 4) + j) * kLine + (v0 + v) * 4 * S::kLanes, none);
            const typename S::Code code = S::expand(unpack.template levels<0>(raw));
            unrolled<kAtOnce>([&](int n) __attribute__((always_inline)) {
              acc[n][v] = S::template dot<kvpack::Side::key>(acc[n][v], code, x.operand[t + n] + j);
            });
          });
        for (int n = 0; n < kAtOnce; ++n)
          for (int v = 0; v < kInFlight; ++v)
            S::store_signed(signs + (t + n) * d + row + v * S::kLanes, S::splat(0), S::to_float(acc[n][v]), 1);
      }
}

}  // namespace
