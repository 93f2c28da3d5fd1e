// Float32, in the order of operations of docs/format.md section 5 (python/kvpack/reference/split.py).
#include "core/split.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>

#include "kernels/powers.inl.h"

namespace kvpack {
namespace {

// The largest magnitude of n values, as bits; those of infinities and NaNs are above kLargest.
constexpr int32_t kLargest = 0x7f7fffff;
int32_t max_bits(const float* x, int32_t n) {
  int32_t top = 0;
  for (int32_t i = 0; i < n; ++i) top = std::max(top, std::bit_cast<int32_t>(x[i]) & 0x7fffffff);
  return top;
}

}  // namespace

void GatheredTile::gather(const KernelTable& k, const EncodeArgs& a, const SideLayout& layout) {
  // Without a map there are zeros, or an infinity or NaN that the encoder will find: the first channels will do. So
  // they will for a map of another number of channels, which rows would not have room for.
  uint8_t first[kMaxHeadDim / 8] = {};
  std::memset(first, 0xff, static_cast<size_t>(layout.part[0].dims / 8));
  const int32_t d = layout.head_dim;
  int32_t outliers = 0;
  for (int32_t i = 0; i < d / 8; ++i) outliers += std::popcount(a.tile.map[i]);
  const bool known = outliers == layout.part[0].dims;
  for (const CodePart& part : layout.part)
    k.gather({a.from, a.stride, known ? a.tile.map : first, x + kTile * part.first, d, part.dims, part.first == 0});
}

void GatheredTile::scatter(const SideLayout& layout, const uint8_t* map, float* to) const {
  const Channels channels(map, layout.head_dim);
  for (const CodePart& part : layout.part)
    for (int32_t t = 0; t < kTile; ++t) {
      const float* from = x + kTile * part.first + t * part.dims;
      for (int32_t i = 0; i < part.dims; ++i) to[t * layout.head_dim + channels.at[part.first + i]] = from[i];
    }
}

void make_map(const EncodeArgs& a, const SideLayout& layout) {
  const int32_t d = layout.head_dim;
  int32_t top = 0;
  for (int32_t t = 0; t < kTile; ++t) top = std::max(top, max_bits(a.from + t * a.stride, d));
  if (top == 0 || top > kLargest) return;
  const PowerOfTwo power(std::bit_cast<float>(top));
  float energy[kMaxHeadDim] = {};
  for (int32_t t = 0; t < kTile; ++t)
    for (int32_t i = 0; i < d; ++i) {
      const float x = a.from[t * a.stride + i] * power.down * power.down_again;
      energy[i] = energy[i] + x * x;
    }
  uint8_t order[kMaxHeadDim];
  for (int32_t i = 0; i < d; ++i) order[i] = static_cast<uint8_t>(i);
  const int32_t outliers = layout.part[0].dims;
  std::partial_sort(order, order + outliers, order + d,
                    [&](uint8_t i, uint8_t j) { return energy[i] != energy[j] ? energy[i] > energy[j] : i < j; });
  for (int32_t n = 0; n < outliers; ++n)
    a.tile.map[order[n] / 8] = static_cast<uint8_t>(a.tile.map[order[n] / 8] | 1 << (order[n] % 8));
}

int32_t encode_mean_split(const KernelTable& k, const EncodeArgs& a, const SideLayout& layout,
                          const GatheredTile& gathered) {
  const int32_t d = layout.head_dim;
  int32_t top = 0, tokens = 0;
  for (int32_t t = 0; t < kTile; ++t) {
    const int32_t bits = max_bits(a.from + t * a.stride, d);
    if (bits > kLargest) return t + 1;
    top = std::max(top, bits);
    tokens += bits != 0 ? 1 : 0;
  }
  std::memset(a.tile.mean, 0, static_cast<size_t>(d));
  *a.tile.mean_scale = 0;
  if (tokens == 0) return 0;
  const PowerOfTwo power(std::bit_cast<float>(top));
  const float share = 1.0F / static_cast<float>(tokens);
  alignas(64) float y[kMaxHeadDim] = {};
  for (const CodePart& part : layout.part) {
    float* sum = y + part.first;
    for (int32_t t = 0; t < kTile; ++t) {
      const float* row = gathered.x + kTile * part.first + t * part.dims;
      for (int32_t i = 0; i < part.dims; ++i) sum[i] = sum[i] + row[i] * power.down * power.down_again;
    }
    for (int32_t i = 0; i < part.dims; ++i) sum[i] = sum[i] * share;
    k.rotate(sum, 1, part.dims, signs_of(part.dims), false);
  }
  const float peak = std::bit_cast<float>(max_bits(y, d));
  if (peak < 0x1p-100F) return 0;
  const float step = peak / 127.0F, inv = 1.0F / step;
  for (int32_t i = 0; i < d; ++i) a.tile.mean[i] = static_cast<int8_t>(std::nearbyint(y[i] * inv));
  return store_scale(step, power.e, a.tile.mean_scale) == kCoded ? 0 : -1;
}

int32_t encode_split(const KernelTable& k, const EncodeArgs& a, const SideLayout& layout, GatheredTile& gathered) {
  int32_t status = 0;
  for (const CodePart& part : layout.part) {
    EncodeArgs own = a;
    own.from = own.x = gathered.x + kTile * part.first;
    own.stride = own.head_dim = part.dims;
    own.signs = signs_of(part.dims);
    own.tile = {a.tile.codes + part.codes, a.tile.scales + part.scales,
                a.tile.mean == nullptr ? nullptr : a.tile.mean + part.first, a.tile.mean_scale};
    status = first_of(status, k.encode[part.reader](own));
  }
  return status;
}

void decode_split(const KernelTable& k, const DecodeArgs& a, const SideLayout& layout, GatheredTile& gathered) {
  for (const CodePart& part : layout.part) {
    DecodeArgs own = a;
    own.x = gathered.x + kTile * part.first;
    own.head_dim = part.dims;
    own.signs = signs_of(part.dims);
    own.tile = {a.tile.codes + part.codes, a.tile.scales + part.scales,
                a.tile.mean == nullptr ? nullptr : a.tile.mean + part.first, a.tile.mean_scale};
    k.decode[part.reader](own);
  }
  gathered.scatter(layout, a.tile.map, a.x);
}

}  // namespace kvpack
