// Encode and decode of one side of one tile: gathers rows, calls the kernel of the codec, words the errors.
#include <algorithm>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>

#include "core/fp_control.h"
#include "core/split.h"
#include "core/transform.h"
#include "kernels/table.h"
#include "kvpack/codec.h"
#include "kvpack/isa.h"
#include "simd/half.h"

namespace kvpack {

void serial_for(int64_t n, void (*body)(void*, int64_t), void* context) {
  for (int64_t i = 0; i < n; ++i) body(context, i);
}

void load_row(const uint8_t* from, Dtype dtype, int32_t n, float* to) {
  if (dtype == Dtype::f32) {
    std::memcpy(to, from, static_cast<size_t>(n) * 4);
    return;
  }
  for (int32_t i = 0; i < n; ++i) {
    uint16_t bits;
    std::memcpy(&bits, from + 2 * i, 2);
    to[i] = dtype == Dtype::f16 ? half_to_float(bits) : bfloat_to_float(bits);
  }
}

void store_row(const float* from, Dtype dtype, int32_t n, uint8_t* to) {
  if (dtype == Dtype::f32) {
    std::memcpy(to, from, static_cast<size_t>(n) * 4);
    return;
  }
  for (int32_t i = 0; i < n; ++i) {
    const uint16_t bits = dtype == Dtype::f16 ? float_to_half(from[i]) : float_to_bfloat(from[i]);
    std::memcpy(to + 2 * i, &bits, 2);
  }
}

namespace {

bool is_split(CodecCode code) { return codecs()[static_cast<size_t>(code.id)].split; }

const Projection* projection(CodecCode code, int32_t head_dim) {
  return codecs()[static_cast<size_t>(code.id)].projected ? &projection_of(head_dim) : nullptr;
}

// Too large for the stack; one per thread that ever encodes with a trellis codec.
uint8_t* workspace(CodecCode code) {
  struct alignas(64) Block {
    uint8_t bytes[kEncodeWorkspace];
  };
  thread_local std::unique_ptr<Block> block;
  if (!codecs()[static_cast<size_t>(code.id)].trellis) return nullptr;
  if (!block) block = std::make_unique<Block>();
  return block->bytes;
}

struct Scratch {
  alignas(64) float x[kTile * kMaxHeadDim];
  alignas(64) uint8_t codes[kTile * kMaxHeadDim];

  // What an encoder needs. `tokens` rows, and zeros for the rest of the tile; whole tiles of floats stay where they
  // are.
  EncodeArgs args(const Vectors& from, int32_t tokens, CodecCode code, int32_t d, Side side, TileSide out) {
    EncodeArgs a{x, d,    x,         out,         codes,           signs_of(d),
                 d, side, code.rule, code.search, workspace(code), projection(code, d)};
    if (tokens == kTile && from.dtype == Dtype::f32 && reinterpret_cast<uintptr_t>(from.data) % 4 == 0 &&
        from.stride % 4 == 0) {
      a.from = reinterpret_cast<const float*>(from.data);
      a.stride = from.stride / 4;
      return a;
    }
    for (int32_t t = 0; t < tokens; ++t) load_row(from.data + t * from.stride, from.dtype, d, x + t * d);
    std::memset(x + tokens * d, 0, static_cast<size_t>(kTile - tokens) * static_cast<size_t>(d) * 4);
    return a;
  }
};

// `exact` keeps elements: keys dim by dim (64 tokens side by side), values token by token.
template <class Element>
void exact_keys(const uint8_t* rows, ptrdiff_t stride, int32_t tokens, int32_t d, uint8_t* out) {
  for (int32_t t = 0; t < kTile; ++t)
    for (int32_t i = 0; i < d; ++i) {
      Element e{};
      if (t < tokens)
        std::memcpy(&e, rows + t * stride + static_cast<ptrdiff_t>(i) * static_cast<ptrdiff_t>(sizeof e), sizeof e);
      std::memcpy(out + (static_cast<size_t>(i) * kTile + static_cast<size_t>(t)) * sizeof e, &e, sizeof e);
    }
}

template <class Element>
void exact_key_row(const uint8_t* tile, int32_t token, int32_t d, uint8_t* out) {
  for (int32_t i = 0; i < d; ++i)
    std::memcpy(out + static_cast<size_t>(i) * sizeof(Element),
                tile + (static_cast<size_t>(i) * kTile + static_cast<size_t>(token)) * sizeof(Element),
                sizeof(Element));
}

void check_finite(const Vectors& x, int32_t tokens, int32_t d, Side side, int64_t first_token) {
  float row[kMaxHeadDim];
  for (int32_t t = 0; t < tokens; ++t) {
    load_row(x.data + t * x.stride, x.dtype, d, row);
    float check = 0.0F;
    for (int32_t i = 0; i < d; ++i) check += row[i] * 0.0F;
    if (check != 0.0F)
      throw std::invalid_argument("NaN or Inf in the " + std::string(side == Side::key ? "key" : "value") +
                                  " of token " + std::to_string(first_token + t) +
                                  " (KVPACK_NONFINITE=zero replaces and counts)");
  }
}

void encode_exact(const Vectors& x, int32_t tokens, CodecCode code, int32_t d, Side side, TileSide out,
                  int64_t first_token) {
  if (x.dtype != code.dtype)
    throw std::invalid_argument("codec exact: the tile's dtype and the dtype of the input differ");
  check_finite(x, tokens, d, side, first_token);
  const size_t row_bytes = static_cast<size_t>(d) * static_cast<size_t>(dtype_bytes(code.dtype));
  if (side == Side::key) {
    if (code.dtype == Dtype::f32)
      exact_keys<uint32_t>(x.data, x.stride, tokens, d, out.codes);
    else
      exact_keys<uint16_t>(x.data, x.stride, tokens, d, out.codes);
    return;
  }
  for (int32_t t = 0; t < tokens; ++t)
    std::memcpy(out.codes + static_cast<size_t>(t) * row_bytes, x.data + t * x.stride, row_bytes);
  std::memset(out.codes + static_cast<size_t>(tokens) * row_bytes, 0, static_cast<size_t>(kTile - tokens) * row_bytes);
}

[[noreturn]] void throw_status(int32_t status, CodecCode code, Side side, int64_t first_token) {
  const std::string name = side == Side::key ? "key" : "value";
  const std::string token = std::to_string(first_token + (status > 0 ? status : -status) - 1);
  if (status > 0)
    throw std::invalid_argument("NaN or Inf in the " + name + " of token " + token +
                                " (KVPACK_NONFINITE=zero replaces and counts)");
  throw std::invalid_argument("the fp16 scale of the " + name + " of token " + token + " overflows (codec " +
                              std::string(codecs()[static_cast<size_t>(code.id)].name) +
                              "): the vector's norm is too large");
}

}  // namespace

void encode_tile(const Vectors& x, int32_t tokens, int64_t codec, int32_t head_dim, Side side, TileSide out,
                 int64_t first_token) {
  const CodecCode code = CodecCode::unpack(codec);
  const FpControl ieee(FpControl::Mode::ieee);
  const KernelTable& k = kernels();
  if (code.id == 0) return encode_exact(x, tokens, code, head_dim, side, out, first_token);
  Scratch s;
  const EncodeArgs args = s.args(x, tokens, code, head_dim, side, out);
  int32_t status = 0;
  if (is_split(code)) {
    const SideLayout layout = layout_of(codec, head_dim, side);
    GatheredTile gathered;
    gathered.gather(k, args, layout);
    if (code.center == Center::tile) status = encode_mean_split(k, args, layout, gathered);
    if (status == 0) status = encode_split(k, args, layout, gathered);
  } else {
    if (code.center == Center::tile) status = k.encode_mean(args);
    if (status == 0) status = k.encode[code.id](args);
  }
  if (status != 0) throw_status(status, code, side, first_token);
}

void freeze_row(const Vectors& x, int32_t tokens, int64_t codec, int32_t head_dim, Side side, TileSide out,
                int64_t first_token) {
  const CodecCode code = CodecCode::unpack(codec);
  const SideLayout layout = layout_of(codec, head_dim, side);
  const bool map =
      layout.map_bytes != 0 && std::all_of(out.map, out.map + layout.map_bytes, [](uint8_t b) { return b == 0; });
  const bool mean = code.center == Center::mean && *out.mean_scale == 0;
  if (!map && !mean) return;
  const FpControl ieee(FpControl::Mode::ieee);
  Scratch s;
  const EncodeArgs args = s.args(x, tokens, code, head_dim, side, out);
  if (map) make_map(args, layout);
  if (!mean) return;
  int32_t status;
  if (is_split(code)) {
    GatheredTile gathered;
    gathered.gather(kernels(), args, layout);
    status = encode_mean_split(kernels(), args, layout, gathered);
  } else {
    status = kernels().encode_mean(args);
  }
  if (status != 0) throw_status(status, code, side, first_token);
}

void decode_tile(ConstTileSide tile, int64_t codec, int32_t head_dim, Side side, int32_t tokens, uint8_t* out,
                 Dtype dtype, ptrdiff_t stride) {
  const CodecCode code = CodecCode::unpack(codec);
  const KernelTable& k = kernels();
  if (code.id != 0) {
    const FpControl ieee(FpControl::Mode::ieee);
    Scratch s;
    const DecodeArgs args{tile, s.x, s.codes, signs_of(head_dim), head_dim, side, projection(code, head_dim)};
    if (is_split(code)) {
      GatheredTile gathered;
      decode_split(k, args, layout_of(codec, head_dim, side), gathered);
    } else {
      k.decode[code.id](args);
    }
    for (int32_t t = 0; t < tokens; ++t) store_row(s.x + t * head_dim, dtype, head_dim, out + t * stride);
    return;
  }
  const size_t row_bytes = static_cast<size_t>(head_dim) * static_cast<size_t>(dtype_bytes(code.dtype));
  alignas(64) uint8_t row[kMaxHeadDim * 4];
  float wide[kMaxHeadDim];
  for (int32_t t = 0; t < tokens; ++t) {
    const uint8_t* from = tile.codes + static_cast<size_t>(t) * row_bytes;
    if (side == Side::key) {
      if (code.dtype == Dtype::f32)
        exact_key_row<uint32_t>(tile.codes, t, head_dim, row);
      else
        exact_key_row<uint16_t>(tile.codes, t, head_dim, row);
      from = row;
    }
    if (dtype == code.dtype) {
      std::memcpy(out + t * stride, from, row_bytes);
    } else {
      load_row(from, code.dtype, head_dim, wide);
      store_row(wide, dtype, head_dim, out + t * stride);
    }
  }
}

}  // namespace kvpack
