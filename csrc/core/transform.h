// Between vectors and the values that the parts of a codec stand for: the rotation, and the projection of codecs with a
// coded residual.
#pragma once
#include "kernels/table.h"
#include "kvpack/codec.h"

namespace kvpack {

// The projection of a head size; made at its first use.
const Projection& projection_of(int32_t head_dim);

// A vector x [head_dim] to what meets the values of all parts, one after the other.
void to_parts(const KernelTable&, const CodecInfo&, int32_t head_dim, const float* x, float* out);

// The transpose, in place: values of all parts to the vector.
void from_parts(const KernelTable&, const CodecInfo&, int32_t head_dim, float* x);

}  // namespace kvpack
