// e4m3 codes (OCP, "e4m3fn") with one fp16 scale per vector, the largest value of which becomes 448. Its levels do not
// fit int8: it is read in floats, as `exact` is, or in two bytes of fixed point (kernels/e4m3.inl.h).
#pragma once
#include "codecs/traits.h"

namespace kvpack {

struct Fp8 : CodecDefaults {
  static constexpr int32_t kBits = 8;
  static constexpr bool kElements = true;
};

}  // namespace kvpack
