// Two bits plus one: the 2-bit Lloyd-Max code and the sign of its residual, in the rotated basis.
//
// The residual of a code is +-delta, delta = E|z - c(z)| = 0.2753 under N(0, 1): one constant, because after the
// rotation the residuals of all vectors look alike. So the levels are c -+ delta, the sign of the residual is the
// choice of the nearer one, and a 3-bit scalar codebook says it all: distortion D(2) - delta^2 = 0.0417, against 0.0345
// of the 3-bit Lloyd-Max codebook. It is here to be compared with.
#pragma once
#include "codecs/lloyd_max.h"

namespace kvpack {

struct Tqr3 : LloydMax<3> {
  static constexpr double kUnit = 0.025176;
  static constexpr LevelTable kLevels{{-71, -49, -29, -7, 7, 29, 49, 71}};  // -+18 and -+60, -+11 each
};

}  // namespace kvpack
