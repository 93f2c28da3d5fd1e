// The identity codec: tiles hold the model's elements. It exists so that the packed path can be held against the
// stock cache bit for bit, and so that "how much faster than exact" is measured in our own best exact kernel.
#pragma once
#include "codecs/traits.h"

namespace kvpack {

struct Exact : CodecDefaults {
  static constexpr int32_t kBits = 0;
};

}  // namespace kvpack
