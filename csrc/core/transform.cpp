#include "core/transform.h"

#include <array>
#include <cmath>
#include <cstring>
#include <mutex>
#include <numbers>

#include "core/splitmix.h"

namespace kvpack {
namespace {

// Matrices of all head sizes, one after the other. Not on the heap: the first tile of a thread must not allocate.
constexpr size_t matrix_at(size_t head_size) {
  size_t at = 0;
  for (size_t i = 0; i < head_size; ++i) at += static_cast<size_t>(kHeadDims[i] * kHeadDims[i]);
  return at;
}
alignas(64) float matrices[matrix_at(std::size(kHeadDims))];
alignas(64) uint8_t matrix_lines[matrix_at(std::size(kHeadDims))];

// Entries are integers: 32 times a normal variable, rounded.
struct Entries {
  std::once_flag once;
  Projection projection{};

  void make(int32_t d, float* columns, uint8_t* lines) {
    std::array<long, 127> borders;
    for (size_t k = 0; k < borders.size(); ++k)
      borders[k] = std::lround(32768 * std::erf((static_cast<double>(k) + 0.5) / 32 / std::numbers::sqrt2));
    SplitMix64 random{0x716a6c70726f8000ULL + static_cast<uint64_t>(d)};
    uint64_t word = 0;
    double squares = 0;
    for (int32_t i = 0; i < d; ++i)
      for (int32_t j = 0; j < d; ++j) {
        word = j % 4 == 0 ? random.next() : word >> 16;
        const auto uniform = static_cast<long>(word & 0x7fff);
        float size = 0;
        for (const long border : borders) size += uniform >= border ? 1.0F : 0.0F;
        const float entry = (word & 0x8000) != 0 ? -size : size;
        columns[j * d + i] = entry;
        lines[((i / 16 * (d / 4) + j / 4) * 16 + i % 16) * 4 + j % 4] = static_cast<uint8_t>(entry + 128.0F);
        squares += size * size;
      }
    projection = {columns, lines, static_cast<float>(std::sqrt(std::numbers::pi / 2 * d / squares))};
  }
};

}  // namespace

const Projection& projection_of(int32_t head_dim) {
  static std::array<Entries, std::size(kHeadDims)> all;
  size_t i = 0;
  while (kHeadDims[i] != head_dim) ++i;
  std::call_once(all[i].once, [&] { all[i].make(head_dim, matrices + matrix_at(i), matrix_lines + matrix_at(i)); });
  return all[i].projection;
}

Channels::Channels(const uint8_t* map, int32_t d) {
  int32_t n = 0;
  for (const bool outlier : {true, false})
    for (int32_t i = 0; i < d; ++i)
      if ((map != nullptr && (map[i / 8] >> (i % 8) & 1) != 0) == outlier) at[n++] = static_cast<uint8_t>(i);
}

Transform::Transform(const KernelTable& k, const CodecInfo& codec, const SideLayout& layout, const uint8_t* map)
    : k_(k), codec_(codec), layout_(layout), channels_(map, codec.split ? layout.head_dim : 0) {}

void Transform::to_parts(const float* x, float* out) const {
  const int32_t d = layout_.head_dim;
  if (codec_.split) {
    for (int32_t i = 0; i < d; ++i) out[i] = x[channels_.at[i]];
    for (const CodePart& part : layout_.part) k_.rotate(out + part.first, 1, part.dims, signs_of(part.dims), false);
    return;
  }
  std::memcpy(out, x, static_cast<size_t>(d) * 4);
  if (codec_.rotated) k_.rotate(out, 1, d, signs_of(d), false);
  if (!codec_.projected) return;
  const Projection& p = projection_of(d);
  k_.project(p.columns, out, out + d, d);
  for (int32_t i = 0; i < d; ++i) out[d + i] *= p.worth / kSignLevel;
}

void Transform::from_parts(float* x) const {
  const int32_t d = layout_.head_dim;
  if (codec_.split) {
    alignas(64) float y[kMaxHeadDim];
    std::memcpy(y, x, static_cast<size_t>(d) * 4);
    for (const CodePart& part : layout_.part) k_.rotate(y + part.first, 1, part.dims, signs_of(part.dims), true);
    for (int32_t i = 0; i < d; ++i) x[channels_.at[i]] = y[i];
    return;
  }
  if (codec_.projected) {
    const Projection& p = projection_of(d);
    for (int32_t i = 0; i < d; ++i) x[d + i] *= p.worth / kSignLevel;
    k_.project_back(p.columns, x + d, x, d);
  }
  if (codec_.rotated) k_.rotate(x, 1, d, signs_of(d), true);
}

}  // namespace kvpack
