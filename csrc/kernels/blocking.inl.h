// What the kernels of the read path share: register blocking of those that keep accumulators of a group of rows, and
// the loading of fp16 scales.
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

// Vectors of lanes that are in flight together.
template <class S>
constexpr int vectors_in_flight(int group) {
  const int fit = S::kAccumulators / group;
  return fit >= 4 ? 4 : fit >= 2 ? 2 : 1;
}

template <class S>
[[gnu::always_inline]] inline typename S::F load_scales(const uint16_t* scales) {
  return S::template load_element<kvpack::Dtype::f16>(reinterpret_cast<const uint8_t*>(scales));
}

}  // namespace
