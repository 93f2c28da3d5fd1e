// The registry: codecs.def as data, and the checks that every entry point shares.
#include <algorithm>
#include <array>
#include <stdexcept>
#include <string>
#include <type_traits>

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
   TwoParts<Traits> ? 2 : 1,                         \
   Traits::kProjected,                               \
   Traits::kSplit,                                   \
   what,                                             \
   source},
#include "codecs/codecs.def"
#undef KVPACK_CODEC
}};

template <class Codec>
constexpr int32_t id_of() {
  int32_t found = -1;
#define KVPACK_CODEC(id, name, Traits, what, source) \
  if (std::is_same_v<Codec, Traits>) found = id;
#include "codecs/codecs.def"
#undef KVPACK_CODEC
  return found;
}

// Sizes and parts of one side of a tile.
template <class Codec>
void set_sections(SideLayout& s) {
  const int32_t d = s.head_dim;
  s.scale_bytes = static_cast<size_t>(scale_rows_of<Codec>(s.side, d)) * kTile * 2;
  s.code_bytes = code_bytes_of<Codec>(d);
  s.parts = 1;
  s.part[0] = {id_of<Codec>(), 0, d, 0, 0};
  if constexpr (TwoParts<Codec>) {
    using First = typename Codec::First;
    using Second = typename Codec::Second;
    const int32_t dims = Codec::part_dims(0, d);
    s.parts = 2;
    s.part[0] = {id_of<First>(), 0, dims, 0, 0};
    s.part[1] = {id_of<Second>(), dims, Codec::part_dims(1, d), kTile, code_bytes_of<First>(dims)};
    if (Codec::kSplit) s.map_bytes = static_cast<size_t>(d / 8);
  }
}
constexpr std::array<void (*)(SideLayout&), kCodecs> kSections{{
#define KVPACK_CODEC(id, name, Traits, what, source) set_sections<Traits>,
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
  SideLayout layout{info.bits, d, side, code.center, 0, 0, 1, {}, 0};
  kSections[static_cast<size_t>(code.id)](layout);
  if (info.bits == 0) layout.code_bytes = static_cast<size_t>(kTile * d) * static_cast<size_t>(dtype_bytes(code.dtype));
  return layout;
}

}  // namespace kvpack
