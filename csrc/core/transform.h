// Between vectors and the values that the parts of a codec stand for: the rotation, the projection of codecs with a
// coded residual, and the channels of split codecs.
#pragma once
#include "kernels/table.h"
#include "kvpack/codec.h"

namespace kvpack {

// The projection of a head size; made at its first use.
const Projection& projection_of(int32_t head_dim);

// The +-1 vector of one of kRotatedDims.
const float* signs_of(int32_t dims);

// The channels of both parts of a split codec, one after the other. No map, or one of zeros: 0, 1, 2, ...
struct Channels {
  uint8_t at[kMaxHeadDim];
  Channels(const uint8_t* map, int32_t head_dim);
};

// Between vectors of a side and what meets the values of all its parts, one after the other. `map`: that of a split
// codec, or null.
class Transform {
 public:
  Transform(const KernelTable&, const CodecInfo&, const SideLayout&, const uint8_t* map);
  void to_parts(const float* x, float* out) const;  // x [head_dim]
  void from_parts(float* x) const;                  // the transpose, in place

 private:
  const KernelTable& k_;
  const CodecInfo& codec_;
  const SideLayout& layout_;
  Channels channels_;
};

}  // namespace kvpack
