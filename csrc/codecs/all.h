// Every codec family. A new family adds its header here and its line to codecs.def.
#pragma once
#include "codecs/affine.h"
#include "codecs/exact.h"
#include "codecs/fp8.h"
#include "codecs/kivi.h"
#include "codecs/lloyd_max.h"
#include "codecs/qjl.h"
#include "codecs/residual.h"
#include "codecs/split.h"
#include "codecs/tcq.h"

namespace kvpack {

constexpr int32_t kCodecs = 0
#define KVPACK_CODEC(id, name, Traits, what, source) +1
#include "codecs/codecs.def"
#undef KVPACK_CODEC
    ;

}  // namespace kvpack
