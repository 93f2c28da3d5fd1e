// The kernel table: the plain-C surface between an ISA unit and the rest of the core. One table per ISA, filled by
// the templates in kernels/*.inl.h; dispatch picks a table once per call.
#pragma once
#include "codecs/all.h"
#include "codecs/trellis.h"
#include "kvpack/format.h"

namespace kvpack {

constexpr int32_t kMaxGroup = 4;  // query rows that share one unpacking of a tile

// A query row, quantized for integer scores: int8 levels, each of which refines the one before by a factor of 254, and
// one scale per scale block of the key codec (of e4m3 keys: per kElementQueryBlock). Precision "standard" takes one,
// "high" two, and tokens that stand out one more.
constexpr int32_t kQueryLevels = 3;
struct alignas(64) QueryRow {
  int32_t operand[kQueryLevels][kMaxHeadDim / 4];
  float scale[kQueryLevels][kMaxScaleBlocks];
  int32_t offset[kQueryLevels]
                [kMaxScaleBlocks];  // -128 times the sum of the operands, where a level wants it (key_begin)
};

constexpr int32_t kElementQueryBlock = 32;  // dims that share a scale of the query, of keys that are e4m3 floats

struct SoftmaxRow {
  float max, sum;   // running maximum (log2 units), or up to kRise less, and sum of 2^(score - max)
  float elsewhere;  // such a sum that other work items are known to have
  float pending;    // such a sum of the tokens that the mean of their values has yet to be added for
};

struct QuantizeQueryArgs {
  const float* query;  // [head_dim], rotated if the codec is, scaled by softmax scale * log2(e)
  int32_t head_dim, scale_block, levels;
  QueryRow* row;
};

struct ScoreArgs {
  const QueryRow* rows;  // [group], coded keys
  const float* query;    // [group][head_dim], keys that are elements or asymmetric
  ConstTileSide tile;
  const uint8_t* ahead;  // same section of a tile to come, prefetched line by line
  float* scores;         // [group][kTile], log2 units
  int32_t head_dim;
  int32_t first, levels;  // of the query: from one to before the other
  bool add = false;       // to the scores of the part before, or of the levels before
};

struct SoftmaxArgs {
  float* scores;      // [group][kTile] in: log2 units; out: 2^(score + bias - max)
  const float* bias;  // [group]
  SoftmaxRow* rows;   // [group]
  float* out;         // [group][out_stride] accumulated so far, rescaled when a maximum grows
  int32_t group, out_stride;
  float negligible;  // of a row's sum so far, the share of all these scores
  float notable;     // of a row's sum so far, the share of one score; 0: none is
};

struct SoftmaxResult {
  bool negligible;   // in all rows
  uint32_t notable;  // rows with such a score, in bits; if there are any, nothing else was done
};

struct AccumulateArgs {
  const float* probs;  // [group][kTile]
  ConstTileSide tile;
  const uint8_t* ahead;
  float* out;  // [group][out_stride], += probs x decoded values
  int32_t out_stride, head_dim, levels, dither;
};

// Rows of exact tokens: window, sinks, the call's own tokens (and exact value tiles).
struct DenseArgs {
  const uint8_t* rows;
  ptrdiff_t stride;  // bytes between tokens
  const float* query;
  float* probs;  // [group][kTile]: written by score, read by accumulate
  const uint8_t* ahead;
  float* out;
  int32_t out_stride, head_dim, tokens, group;
};

// The matrix of projected residuals, docs/format.md section 4.
struct Projection {
  const float* columns;  // [column][row]
  const uint8_t* lines;  // plus 128, [row / 16][column / 4][row % 16][column % 4]: its rows as keys of 8 bits
  float worth;           // of a sign, beside the scale
};
constexpr float kSignLevel = 100.0F;  // signs are read with the levels of tq1

// Scratch of an encoder: the search of the trellis codecs.
constexpr size_t kEncodeWorkspace = size_t{512} * 1024;

// Encode and decode work on one side of one tile. status: 0 ok, else token + 1 of the offending vector, negative for
// a scale that overflows fp16, positive for a non-finite input.
struct EncodeArgs {
  const float* from;  // rows of the input, `stride` floats apart
  ptrdiff_t stride;
  float* x;  // [kTile][head_dim]: vectors in the rotated domain; may be the input
  TileSide tile;
  uint8_t* scratch;    // [kTile][head_dim] codes
  const float* signs;  // [head_dim], +-1
  int32_t head_dim;
  Side side;
  Rule rule;
  bool search;         // of the encode scale
  uint8_t* workspace;  // kEncodeWorkspace bytes
  const Projection* projection;
};
struct DecodeArgs {
  ConstTileSide tile;
  float* x;          // [kTile][head_dim]
  uint8_t* scratch;  // [kTile][head_dim] codes
  const float* signs;
  int32_t head_dim;
  Side side;
  const Projection* projection;
};

// Gains that the search of the encode scale tries besides 1.
constexpr float kSearchGains[6] = {0.88F, 0.92F, 0.96F, 1.04F, 1.08F, 1.12F};

// Rows of a tile, of which a part of the channels is taken.
struct GatherArgs {
  const float* from;  // [kTile], `stride` floats apart
  ptrdiff_t stride;
  const uint8_t* map;  // a bit for each of the channels
  float* to;           // [kTile][dims], and kGatherSlack floats that may be overwritten
  int32_t head_dim, dims;
  bool outliers;  // those whose bits are set, else the others
};
constexpr int32_t kGatherSlack = 16;

// The mean of a tile or of a row, for a group of query rows.
struct MeanArgs {
  const int8_t* mean;  // [head_dim]
  float scale;
  int32_t head_dim, group, stride;  // floats between the rows of query or out
  const float* query;               // rotated rows
  float* bias;                      // [group] = query . mean
  SoftmaxRow* rows;                 // [group]
  float* out;                       // rows += pending * mean, and nothing is pending then
};

// Kernels that multiply bytes and look levels up. A level that adds instructions for just that to another one has only
// these of its own.
struct Readers {
  bool fixed_point;  // e4m3 tiles are read in integers at precision "standard", else in floats
  void (*quantize_query)(const QuantizeQueryArgs&);
  void (*score[kCodecs][kMaxGroup])(const ScoreArgs&);
  void (*accumulate[kCodecs][kMaxGroup])(const AccumulateArgs&);
};

struct KernelTable : Readers {
  const char* name;
  void (*rotate)(float* x, int64_t rows, int32_t head_dim, const float* signs, bool inverse);
  void (*project)(const float* columns, const float* x, float* out, int32_t head_dim);
  void (*project_back)(const float* columns, const float* x, float* out, int32_t head_dim);  // adds
  SoftmaxResult (*softmax)(const SoftmaxArgs&);
  void (*softcap)(float* scores, int32_t n, float cap);
  void (*score_mean)(const MeanArgs&);
  void (*accumulate_mean)(const MeanArgs&);
  int32_t (*encode_mean)(const EncodeArgs&);
  void (*gather)(const GatherArgs&);
  void (*exact_score[3][kMaxGroup])(const ScoreArgs&);
  void (*dense_score[3])(const DenseArgs&);
  void (*dense_accumulate[3])(const DenseArgs&);
  int32_t (*encode[kCodecs])(const EncodeArgs&);
  void (*decode[kCodecs])(const DecodeArgs&);
  // tcq1, tcq2, tcq2.5, tcq3, tcq3.5, tcq4: x int16 [steps][lanes] in fixed point to codes [steps][lanes].
  void (*trellis_search[kTrellisCodes])(const int16_t* x, int32_t steps, int32_t lanes, uint8_t* codes, TrellisWork*);
};

}  // namespace kvpack
