// The registry: codecs.def as data, and the checks that every entry point shares.
#include <algorithm>
#include <array>
#include <stdexcept>
#include <string>

#include "codecs/all.h"
#include "kvpack/codec.h"

namespace kvpack {
namespace {

constexpr std::array<CodecInfo, kCodecs> kInfo{{
#define KVPACK_CODEC(id, name, Traits, what, source) \
  {id,                                               \
   #name,                                            \
   Traits::kBits,                                    \
   Traits::kRotated,                                 \
   Traits::kScaleRules,                              \
   Traits::kTrellis,                                 \
   Traits::kElements,                                \
   Traits::kAsymmetric,                              \
   Traits::kScaleBlock,                              \
   what,                                             \
   source},
#include "codecs/codecs.def"
#undef KVPACK_CODEC
}};

// Sizes of one side of a tile, by codec.
struct Sizes {
  int32_t (*scale_rows)(Side, int32_t head_dim);
  size_t (*code_bytes)(int32_t head_dim);
};
constexpr std::array<Sizes, kCodecs> kSizes{{
#define KVPACK_CODEC(id, name, Traits, what, source) {scale_rows_of<Traits>, code_bytes_of<Traits>},
#include "codecs/codecs.def"
#undef KVPACK_CODEC
}};

void check_head_dim(int64_t d) {
  if (std::find(std::begin(kHeadDims), std::end(kHeadDims), d) != std::end(kHeadDims)) return;
  std::string allowed;
  for (const int32_t known : kHeadDims) allowed += (allowed.empty() ? "" : ", ") + std::to_string(known);
  throw std::invalid_argument("head_dim " + std::to_string(d) + " is not supported; allowed: " + allowed +
                              " (2^a times 1, 12, 20 or 28)");
}

}  // namespace

std::span<const CodecInfo> codecs() { return kInfo; }

SideLayout layout_of(int64_t codec, int64_t head_dim, Side side) {
  const CodecCode code = CodecCode::unpack(codec);
  if (codec < 0 || codec >> 29 != 0 || code.id >= kCodecs || static_cast<int32_t>(code.rule) > 3 ||
      static_cast<int32_t>(code.dtype) > 2 || static_cast<int32_t>(code.center) > 2)
    throw std::invalid_argument("codec code " + std::to_string(codec) + " is not one of id (0.." +
                                std::to_string(kCodecs - 1) +
                                ") | rule (0..3) << 8 | dtype (0..2) << 16 | center (0..2) << 24 | search << 28");
  check_head_dim(head_dim);
  const CodecInfo& info = kInfo[static_cast<size_t>(code.id)];
  const auto refuse = [&](const char* what) {
    throw std::invalid_argument("codec code " + std::to_string(codec) + ": " + std::string(info.name) + " has no " +
                                what);
  };
  if (!info.scale_rules && code.rule != Rule::stored) refuse("scale rule");
  if (!info.scale_rules && code.search) refuse("search of its scale");
  if (!info.rotated && code.center != Center::none) refuse("centring");
  if (info.bits != 0 && code.dtype != Dtype::f32) refuse("element dtype");
  const auto d = static_cast<int32_t>(head_dim);
  const Sizes& sizes = kSizes[static_cast<size_t>(code.id)];
  const size_t elements = static_cast<size_t>(kTile * d) * static_cast<size_t>(dtype_bytes(code.dtype));
  return side_layout(info.bits, d, side, code.center, sizes.scale_rows(side, d),
                     info.bits == 0 ? elements : sizes.code_bytes(d));
}

}  // namespace kvpack
