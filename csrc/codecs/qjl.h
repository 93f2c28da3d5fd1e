// TurboQuant_prod: a Lloyd-Max code of one bit less, and one bit for each value of a projection of its residual
// (arXiv 2504.19874, algorithm 2; QJL, arXiv 2406.03482). Unbiased inner products.
//
//   rho = y - step * level,   rho ~ sqrt(pi/2) / d * |rho| * S^T sign(S rho),   S Gaussian, independent of the rotation
//
// Part 1 is a codec of its own, part 2 is read by the kernels of tq1: d more values with levels +-100, scale |rho| /
// sqrt(d). The constants go into the query's projection and into the output's way back (core/transform.h).
#pragma once
#include "codecs/lloyd_max.h"

namespace kvpack {

template <class Base>
struct Tqp : CodecDefaults {
  using First = Base;
  using Second = Tq1;
  static constexpr int32_t kBits = Base::kBits + Second::kBits;
  static constexpr bool kRotated = true, kScaleRules = true, kProjected = true;
  static constexpr int32_t part_dims(int32_t /*part*/, int32_t head_dim) { return head_dim; }
};

using Tqp2 = Tqp<Tq1>;
using Tqp3 = Tqp<Tq2>;
using Tqp4 = Tqp<Tq3>;

}  // namespace kvpack
