// The tiles of split codecs (codecs/split.h): their channels gathered into the two parts, which the kernels of the
// parts' codecs encode and decode. And the map of a row, and the mean of a tile, which both parts share.
#pragma once
#include "core/transform.h"
#include "kernels/table.h"

namespace kvpack {

// Rows of a tile, part after part: [kTile][dims] of each.
struct GatheredTile {
  alignas(64) float x[kTile * kMaxHeadDim + kGatherSlack];
  void gather(const KernelTable&, const EncodeArgs&, const SideLayout&);
  // To rows [kTile][head_dim] at `to`.
  void scatter(const SideLayout&, const uint8_t* map, float* to) const;
};

// The map of a tile, if it has a token that is not all zeros (and no NaN or infinity: the encoder will say so).
void make_map(const EncodeArgs&, const SideLayout&);

// As the kernels of these names; status as theirs. Rows that encode_mean_split reads are still there for encode_split.
int32_t encode_mean_split(const KernelTable&, const EncodeArgs&, const SideLayout&, const GatheredTile&);
int32_t encode_split(const KernelTable&, const EncodeArgs&, const SideLayout&, GatheredTile&);
void decode_split(const KernelTable&, const DecodeArgs&, const SideLayout&, GatheredTile&);

}  // namespace kvpack
