// What a codec family has to say about itself. A traits struct is all constants and one table:
//
//   kBits        bits per code (1, 2, 2.5, 3, 3.5, 4, 5, 8; 0 for `exact`, which stores elements)
//   kRotated     codes live in the randomized-Hadamard domain: queries are rotated, outputs rotated back, once per call
//   kScaleRules  has one scale per vector and the choice of its rule (stored, norm, mse, unbiased)
//   kScaleBlock  dims that share one fp16 scale (the last block may be shorter); 0 means the whole head vector
//   kSignedScales  scales may be negative (the accumulation then negates level bytes per token)
//   kElements    codes are e4m3 floats, laid out as the elements of `exact`
//   kAsymmetric  a value is zero + step * code, steps and zeros per channel (keys) or per block (values)
//   kTrellis     codes are the bits of a trellis path; levels come from kTable (codecs/trellis.h)
//   kLevels      2^kBits int8 levels, ascending: the format's codebook (empty where level = code - 2^(kBits - 1))
//   kUnit        level * kUnit approximates the quantized value of a unit-variance coordinate (scale rules)
//   Reads        (optional) the codec that score and accumulate do not tell from this one: kernels made once for both
//   First, Second  (optional) of a codec of two parts: the codecs whose kernels read them
//   part_dims    (with them) the number of values of a part, by part and head size
//   kProjected   the second part is signs of a projection of the residual (codecs/qjl.h)
//   kSplit       the parts are channels of the vector, by a map of each row (codecs/split.h)
//
// Everything is constexpr: the same structs serve host and device code.
#pragma once
#include "kvpack/types.h"

namespace kvpack {

// Levels of a codec as bytes for table look-up; 16 entries are enough for every code of 4 bits or fewer.
struct LevelTable {
  int8_t level[16];
};

// What most codecs are not; a traits struct derives from this and says what it is.
struct CodecDefaults {
  static constexpr int32_t kScaleBlock = 0;
  static constexpr bool kRotated = false, kScaleRules = false, kSignedScales = false, kTrellis = false;
  static constexpr bool kElements = false, kAsymmetric = false, kProjected = false, kSplit = false;
  static constexpr double kUnit = 0.0;
  static constexpr LevelTable kLevels{};
};

template <class Codec>
concept TwoParts = requires {
  typename Codec::Second;
};

template <class Codec>
struct ReadAs {
  using type = Codec;
};
template <class Codec>
requires requires { typename Codec::Reads; }
struct ReadAs<Codec> {
  using type = typename Codec::Reads;
};

// Blocks of dims that have a scale of their own.
constexpr int32_t scale_blocks(int32_t scale_block, double bits, int32_t head_dim) {
  return bits == 0 ? 0 : (scale_block == 0 ? 1 : (head_dim + scale_block - 1) / scale_block);
}

// Sizes of one side of a tile: rows of 64 fp16 scales, and bytes of codes (`exact`: 0, the element type decides). A
// traits struct with members of these names says otherwise.
template <class Codec>
constexpr int32_t scale_rows_of(Side side, int32_t head_dim) {
  if constexpr (requires { Codec::scale_rows(side, head_dim); })
    return Codec::scale_rows(side, head_dim);
  else
    return TwoParts<Codec> ? 2 : scale_blocks(Codec::kScaleBlock, Codec::kBits, head_dim);
}
template <class Codec>
[[gnu::always_inline]] constexpr size_t code_bytes_of(int32_t head_dim) {
  if constexpr (requires { Codec::code_bytes(head_dim); })
    return Codec::code_bytes(head_dim);
  else
    return static_cast<size_t>(kTile / 8 * head_dim * Codec::kBits);
}

}  // namespace kvpack
