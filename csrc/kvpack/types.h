// Vocabulary of the core: sides, dtypes, scale rules, and the codec code that travels through every interface.
#pragma once
#include <cstddef>
#include <cstdint>

namespace kvpack {

enum class Side : int32_t { key = 0, value = 1 };
enum class Dtype : int32_t { f32 = 0, f16 = 1, bf16 = 2, e4m3 = 3 };  // e4m3: inside fp8 tiles only
enum class Rule : int32_t { stored = 0, norm = 1, mse = 2, unbiased = 3 };
enum class Center : int32_t { none = 0, mean = 1, tile = 2 };
enum class Precision : int32_t { standard = 0, high = 1 };

constexpr int32_t kTile = 64;      // tokens of a full tile
constexpr int32_t kPageTiles = 4;  // tiles of one KV head in a page
constexpr int32_t kLine = 64;      // bytes of a line: the unit in which codes are laid out and prefetched
constexpr int32_t kMaxHeadDim = 256;
// Head sizes: 2^a times an order of a Hadamard matrix, 1, 12, 20 or 28. This release carries those in 64..256.
constexpr int32_t kHeadDims[] = {64, 80, 96, 112, 128, 160, 192, 256};
// What is rotated as one vector: heads, and the parts of split codecs (codecs/split.h).
constexpr int32_t kRotatedDims[] = {16, 32, 48, 64, 80, 96, 112, 128, 144, 160, 192, 256};
constexpr int32_t kMaxScaleBlocks = kMaxHeadDim / 32;
constexpr int32_t kMaxParts = 2;

constexpr int32_t dtype_bytes(Dtype t) { return t == Dtype::f32 ? 4 : t == Dtype::e4m3 ? 1 : 2; }

// A codec with its options in one integer: id | rule << 8 | dtype << 16 | center << 24 | search << 28. The dtype
// matters to `exact` only, whose tiles hold the model's own elements; search to encoders only.
struct CodecCode {
  int32_t id;
  Rule rule;
  Dtype dtype;
  Center center;
  bool search;
  static constexpr CodecCode unpack(int64_t code) {
    return {static_cast<int32_t>(code & 0xff), static_cast<Rule>((code >> 8) & 0xff),
            static_cast<Dtype>((code >> 16) & 0xff), static_cast<Center>((code >> 24) & 0xf), ((code >> 28) & 1) != 0};
  }
};

}  // namespace kvpack
