// What a codec family has to say about itself. A traits struct is all constants and one table:
//
//   kBits        bits per code (2, 3, 4, 8; 0 for `exact`, which stores elements)
//   kRotated     codes live in the randomized-Hadamard domain: queries are rotated, outputs rotated back, once per call
//   kScaleBlock  dims that share one fp16 scale (the last block may be shorter); 0 means the whole head vector
//   kSignedScales  scales may be negative (the accumulation then negates level bytes per token)
//   kLevels      2^kBits int8 levels, ascending: the format's codebook (empty for 8 bits, where level = code - 128)
//   kUnit        level * kUnit approximates the quantized value of a unit-variance coordinate (rotated codecs)
//
// Everything is constexpr: the same structs serve host and device code.
#pragma once
#include "kvpack/types.h"

namespace kvpack {

// Levels of a codec as bytes for table look-up; 16 entries are enough for every code of 4 bits or fewer.
struct LevelTable {
  int8_t level[16];
};

constexpr int32_t scale_blocks(int32_t scale_block, int32_t bits, int32_t head_dim) {
  return bits == 0 ? 0 : (scale_block == 0 ? 1 : (head_dim + scale_block - 1) / scale_block);
}

}  // namespace kvpack
