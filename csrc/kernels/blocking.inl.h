// What the kernels of the read path share: register blocking of those that keep accumulators of a group of rows,
// numbers of four rows, and the loading of fp16 scales.
#pragma once
#include <utility>

#include "kvpack/types.h"

namespace {

// body(0), body(1), ..., body(N - 1), written out: accumulator arrays must be indexed by constants to stay in
// registers, whatever the compiler thinks of the size of the body. The index is an integral_constant.
template <int N, class Body>
[[gnu::always_inline]] inline void unrolled(Body&& body) {
  [&]<int... Is>(std::integer_sequence<int, Is...>) __attribute__((always_inline)) {
    (body(std::integral_constant<int, Is>{}), ...);
  }
  (std::make_integer_sequence<int, N>{});
}

// The same pointer, of which the compiler knows nothing: nothing is read through it before this. GCC would take
// broadcasts of all operands out of the loop around it, and spill them.
template <class T>
[[gnu::always_inline]] inline const T* unknown(const T* p) {
  asm volatile("" : "+r"(p));
  return p;
}

// Vectors of lanes that are in flight together.
template <class S>
constexpr int vectors_in_flight(int group) {
  const int fit = S::kAccumulators / group;
  return fit >= 4 ? 4 : fit >= 2 ? 2 : 1;
}

// The units of N lane vectors: begin(v) gives the place of one, meet(v, j, levels) takes its levels. Vectors that are
// open together meet dword by dword, so that a broadcast operand is loaded once for all of them, and none is kept and
// spilled (AVX-512, against one vector after the other: tq3 14 %, tcq3 10 %, tq1 11 %, tq4 1 % faster). Bytes have no
// second dword, and are read best one after the other (10 %).
template <class S, int N, class U, class Begin, class Meet>
[[gnu::always_inline]] inline void meet_units(const U& unpack, typename U::Carry* carry, Begin&& begin, Meet&& meet) {
  constexpr int kFit = U::kDwords == 1 ? 1 : S::kOpenLines / U::kLines, kPower = kFit >= 4 ? 4 : kFit >= 2 ? 2 : 1;
  constexpr int kOpen = kPower < N ? kPower : N;
  static_assert(N % kOpen == 0);
  unrolled<N / kOpen>([&](auto part) __attribute__((always_inline)) {
    typename U::Raw raw[kOpen];
    unrolled<kOpen>([&](auto n) __attribute__((always_inline)) {
      constexpr int v = part * kOpen + n;
      raw[n] = unpack.load(begin(v), carry[v]);
    });
    unrolled<U::kDwords>([&](auto j) __attribute__((always_inline)) {
      unrolled<kOpen>([&](auto n) __attribute__((always_inline)) {
        meet(part * kOpen + n, j, unpack.template levels<j>(raw[n]));
      });
    });
  });
}

// A number of each of four query rows.
using Four = float __attribute__((vector_size(16)));
using IntFour = int32_t __attribute__((vector_size(16)));
[[maybe_unused, gnu::always_inline]] inline Four load_4(const float (&p)[4]) {
  Four v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
[[maybe_unused, gnu::always_inline]] inline void store_4(float (&p)[4], Four v) { __builtin_memcpy(p, &v, sizeof v); }

// v where the mask is set, else 0.
[[maybe_unused, gnu::always_inline]] inline Four where(IntFour mask, Four v) {
  IntFour bits;
  __builtin_memcpy(&bits, &v, sizeof bits);
  bits &= mask;
  __builtin_memcpy(&v, &bits, sizeof v);
  return v;
}
[[maybe_unused, gnu::always_inline]] inline Four lesser(Four a, Four b) { return a < b ? a : b; }

// N vectors of elements, side by side.
template <class S, kvpack::Dtype T, int N>
[[gnu::always_inline]] inline void load_elements(const uint8_t* p, typename S::F (&v)[N]) {
  if constexpr (T == kvpack::Dtype::e4m3 && N % 2 == 0 && requires { S::load_two_e4m3(p, v[0], v[1]); }) {
    for (int i = 0; i < N; i += 2) S::load_two_e4m3(p + i * S::kLanes, v[i], v[i + 1]);
  } else {
    for (int i = 0; i < N; ++i) v[i] = S::template load_element<T>(p + i * S::kLanes * kvpack::dtype_bytes(T));
  }
}

template <class S>
[[gnu::always_inline]] inline typename S::F load_scales(const uint16_t* scales) {
  return S::template load_element<kvpack::Dtype::f16>(reinterpret_cast<const uint8_t*>(scales));
}

}  // namespace
