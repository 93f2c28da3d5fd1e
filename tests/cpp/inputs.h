// Inputs of the tests: portable random numbers, aligned memory, elements of every dtype, the input of the golden bytes.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <new>
#include <vector>

#include "check.h"
#include "kvpack/codec.h"

namespace inputs {

using namespace kvpack;

constexpr uint64_t splitmix64(uint64_t state) {
  uint64_t z = state;
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ULL;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBULL;
  return z ^ (z >> 31);
}
constexpr uint64_t kGamma = 0x9E3779B97F4A7C15ULL;

// Sum of four 16-bit fields, less its middle: nearly Gaussian, an integer, deviation 37837.
inline int32_t field_sum(uint64_t word) {
  return static_cast<int32_t>((word & 0xffff) + (word >> 16 & 0xffff) + (word >> 32 & 0xffff) + (word >> 48)) - 131070;
}

class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed * 0x2545F4914F6CDD1DULL) {}
  uint64_t next() { return splitmix64(state_ += kGamma); }
  float normal() { return static_cast<float>(field_sum(next())) / 37837.0F; }
  double uniform() { return static_cast<double>(next() >> 11) * 0x1p-53; }
  int64_t below(int64_t n) { return static_cast<int64_t>(next() % static_cast<uint64_t>(n)); }

 private:
  uint64_t state_;
};

// Exactly `size` bytes on a 64-byte boundary, so that AddressSanitizer sees the first byte too many; filled with 0xff
// (NaN in every dtype), so that bytes nobody wrote show in the results.
class Bytes {
 public:
  explicit Bytes(size_t size)
      : size_(size), data_(static_cast<uint8_t*>(::operator new (size + (size == 0), std::align_val_t{64}))) {
    std::memset(data_, 0xff, size);
  }
  Bytes(Bytes&& other) noexcept : size_(other.size_), data_(other.data_) { other.data_ = nullptr; }
  Bytes(const Bytes&) = delete;
  Bytes& operator=(const Bytes&) = delete;
  ~Bytes() { ::operator delete (data_, std::align_val_t{64}); }
  uint8_t* data() { return data_; }
  const uint8_t* data() const { return data_; }
  size_t size() const { return size_; }
  bool operator==(const Bytes& other) const {
    return size_ == other.size_ && std::memcmp(data_, other.data_, size_) == 0;
  }

 private:
  size_t size_;
  uint8_t* data_;
};

// One side of one tile, standing alone, with a mean of its own where it is centred, and the map of a split codec.
struct Tile {
  SideLayout layout;
  Bytes bytes, mean;
  Tile(int64_t codec, int32_t head_dim, Side side)
      : layout(layout_of(codec, head_dim, side)),
        bytes(layout.bytes()),
        mean(layout.means_of(1) == 0 ? 0 : layout.mean_bytes()) {}
  TileSide sections() {
    TileSide out{bytes.data() + layout.scale_bytes, reinterpret_cast<uint16_t*>(bytes.data())};
    if (layout.center != Center::none) {
      out.mean = reinterpret_cast<int8_t*>(mean.data());
      out.mean_scale = reinterpret_cast<uint16_t*>(mean.data() + layout.head_dim);
    }
    if (layout.map_bytes != 0) out.map = mean.data() + layout.map_at();
    return out;
  }
  ConstTileSide read() const {
    const TileSide side = const_cast<Tile*>(this)->sections();
    return {side.codes, side.scales, side.mean, side.mean_scale, side.map};
  }
  // As the first tile of a row.
  void freeze(const Vectors& x, int32_t tokens, int64_t codec, int64_t first_token = 0) {
    if (!layout.frozen()) return;
    std::memset(mean.data(), 0, mean.size());
    freeze_row(x, tokens, codec, layout.head_dim, layout.side, sections(), first_token);
  }
  bool operator==(const Tile& other) const { return bytes == other.bytes && mean == other.mean; }
};

inline int64_t code_of(int32_t id, Rule rule = Rule::stored, Dtype dtype = Dtype::f32, Center center = Center::none,
                       bool search = false) {
  return id | static_cast<int64_t>(rule) << 8 | static_cast<int64_t>(dtype) << 16 | static_cast<int64_t>(center) << 24 |
         static_cast<int64_t>(search) << 28;
}

inline const CodecInfo& info_of(int64_t code) { return codecs()[static_cast<size_t>(code & 0xff)]; }

// A codec as it is used where nothing else is said, with options.
inline int64_t default_code(const CodecInfo& info, Dtype dtype = Dtype::f32, Center center = Center::none,
                            bool search = false) {
  return code_of(info.id, info.scale_rules ? Rule::norm : Rule::stored, info.bits == 0 ? dtype : Dtype::f32,
                 info.rotated ? center : Center::none, info.scale_rules && search);
}

// Every codec with every scale rule, and every dtype of `exact`.
inline std::vector<int64_t> codec_codes() {
  std::vector<int64_t> all;
  for (const CodecInfo& c : codecs())
    for (int32_t option = 0; option < (c.scale_rules ? 4 : c.bits == 0 ? 3 : 1); ++option)
      all.push_back(c.bits == 0 ? code_of(c.id, Rule::stored, static_cast<Dtype>(option))
                                : code_of(c.id, static_cast<Rule>(option)));
  return all;
}

// Centring and the search of the scale, on the codecs that have them; `some`: each option on each codec once.
inline std::vector<int64_t> option_codes(bool some) {
  std::vector<int64_t> all;
  for (const CodecInfo& c : codecs())
    for (const Center center : {Center::none, Center::mean, Center::tile})
      for (const bool search : {false, true}) {
        if ((center != Center::none && !c.rotated) || (search && !c.scale_rules)) continue;
        if ((center == Center::none && !search) || (some && search != (center == Center::mean) && c.scale_rules))
          continue;
        for (int32_t rule = 0; rule < (c.scale_rules ? 4 : 1); ++rule)
          if (!some || rule == (c.scale_rules ? (c.id + static_cast<int32_t>(center)) % 4 : 0))
            all.push_back(code_of(c.id, static_cast<Rule>(rule), Dtype::f32, center, search));
      }
  return all;
}

// Both lists; `all`: every combination of options.
inline std::vector<int64_t> codes_with_options(bool all) {
  auto codes = codec_codes();
  for (const int64_t code : option_codes(!all)) codes.push_back(code);
  return codes;
}

// Whether a test that loops over codec codes and head sizes leaves this one out. Unless everything is wanted, codecs as
// they are by default take all head sizes, and options one or two, in turn; fewer where a check takes long: the search
// of a trellis, sanitizers, an emulator.
inline bool skip(int64_t code, int32_t d) {
  if (check::full()) return false;
  const bool plain = code == default_code(info_of(code)), trellis = info_of(code).trellis;
  if (plain && !check::slow()) return false;
  const auto turn = static_cast<size_t>(code ^ code >> 8 ^ code >> 24) % std::size(kHeadDims);
  if (trellis || (!plain && check::slow())) return d != (plain ? 80 : kHeadDims[turn]);
  return d != 80 && d != kHeadDims[turn];
}

// The dtype in which a codec takes its input here: the tile's own for `exact`, float32 else.
inline Dtype input_dtype(int64_t code) { return info_of(code).bits == 0 ? CodecCode::unpack(code).dtype : Dtype::f32; }

// float32 rows as elements of `dtype`.
inline std::vector<uint8_t> elements(const std::vector<float>& x, Dtype dtype) {
  std::vector<uint8_t> out(x.size() * static_cast<size_t>(dtype_bytes(dtype)));
  store_row(x.data(), dtype, static_cast<int32_t>(x.size()), out.data());
  return out;
}

// Encodes rows of float32, rounded to what the codec takes. The mean of a row and its map are those of this tile.
inline Tile encode(const std::vector<float>& x, int64_t code, int32_t d, Side side, int32_t tokens = kTile) {
  Tile tile(code, d, side);
  const Dtype dtype = input_dtype(code);
  const auto rows = elements(x, dtype);
  const Vectors vectors{rows.data(), dtype, static_cast<ptrdiff_t>(d) * dtype_bytes(dtype)};
  tile.freeze(vectors, tokens, code);
  encode_tile(vectors, tokens, code, d, side, tile.sections(), 0);
  return tile;
}

constexpr int32_t kGoldenRows = 2, kGoldenTokens = 150;

// `inputs(d)` of tests/golden/make.py: float32 [2][150][d].
inline std::vector<float> golden(int32_t d) {
  std::vector<float> x;
  uint64_t state = static_cast<uint64_t>(d);
  for (int32_t row = 0; row < kGoldenRows; ++row)
    for (int32_t token = 0; token < kGoldenTokens; ++token)
      for (int32_t i = 0; i < d; ++i) {
        float v = std::ldexp(static_cast<float>(field_sum(splitmix64(state += kGamma))), 7 * token % 17 - 11 - 15);
        if (row == 0) switch (token) {
            case 3: v = 0.0F; break;
            case 5: v = i == 20 ? -3.0F : 0.0F; break;
            case 7: v = i % 2 != 0 ? -0.0F : 0.0F; break;
            case 9: v = std::ldexp(v, -130); break;
            case 11: v = std::ldexp(v, -90); break;
            case 17: v = -1.0F; break;
            case 19: v = i % 2 != 0 ? -1.0F : 1.0F; break;
            case 21: v = std::ldexp(v, -(i % 40)); break;
            case 23: v = std::ldexp(v, 8); break;
            case 25: v = std::ldexp(v, -13); break;
            default: break;
          }
        x.push_back(v);
      }
  return x;
}

}  // namespace inputs
