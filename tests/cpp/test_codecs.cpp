// Codecs: bytes identical on every level and equal to the golden ones; decoding against double precision.
#include <algorithm>
#include <set>
#include <string>

#include "check.h"
#include "core/transform.h"
#include "kernels/table.h"
#include "kvpack/isa.h"
#include "kvpack/pages.h"
#include "reference.h"

namespace {

using namespace kvpack;
using inputs::Random;
constexpr Side kSides[] = {Side::key, Side::value};

std::string label(int64_t code, int32_t d, Side side) {
  const CodecCode c = CodecCode::unpack(code);
  return std::string(inputs::info_of(code).name) + " rule " + std::to_string(static_cast<int>(c.rule)) + " dtype " +
         std::to_string(static_cast<int>(c.dtype)) + " centre " + std::to_string(static_cast<int>(c.center)) +
         (c.search ? " searched" : "") + " head_dim " + std::to_string(d) + (side == Side::key ? " keys" : " values");
}

// Runs `body` on a level, and goes back to the one that was in use.
template <class Body>
auto on_level(const std::string& name, Body&& body) {
  const std::string before = isa_active();
  isa_use(name);
  auto result = body();
  isa_use(before);
  return result;
}

uint64_t fnv1a(const uint8_t* data, size_t n, uint64_t hash = 0xcbf29ce484222325ULL) {
  for (size_t i = 0; i < n; ++i) hash = (hash ^ data[i]) * 0x100000001b3ULL;
  return hash;
}

// A tile of vectors that are hard on rounding, on signs of zero or on the exponent range.
std::vector<float> hard_vectors(int32_t d, uint64_t seed) {
  Random random(seed);
  std::vector<float> x(static_cast<size_t>(kTile * d), 0.0F);
  for (int t = 0; t < kTile; ++t) {
    float* v = x.data() + t * d;
    const auto fill = [&](auto&& f) {
      for (int i = 0; i < d; ++i) v[i] = f(i);
    };
    switch (t % 16) {
      case 0: break;  // zeros
      case 1: fill([](int) { return -0.0F; }); break;
      case 2: v[random.below(d)] = -3.0F; break;  // one-hot: every rotated coordinate has the same magnitude
      case 3:                                     // few equal entries: exact zeros of both signs after rotation
        for (int64_t n = 1 + random.below(7); n >= 0; --n) v[random.below(d)] = random.below(2) != 0 ? -1.0F : 1.0F;
        break;
      case 4: fill([&](int) { return std::ldexp(random.normal(), -140); }); break;  // denormals
      case 5: fill([&](int) { return random.below(3) == 0 ? std::ldexp(1.0F, -149) : 0.0F; }); break;
      case 6: fill([&](int) { return std::ldexp(random.normal(), static_cast<int>(random.below(40)) - 35); }); break;
      case 7: fill([&](int i) { return std::ldexp(random.normal(), -4 * (i % 36)); }); break;  // products underflow
      case 8:  // q8_0: x * 127 / max falls on halves
        fill([&](int i) { return i % 32 == 0 ? 127.0F : static_cast<float>(random.below(127)) + 0.5F; });
        break;
      case 9:  // q4_0: x / step + 8.5 falls on integers
        fill([&](int i) { return i % 32 == 5 ? -8.0F : static_cast<float>(random.below(15)) - 7.5F; });
        break;
      case 10: fill([&](int) { return random.below(2) != 0 ? 1.0F : -1.0F; }); break;  // magnitudes tie: the first wins
      case 11: fill([&](int i) { return (i & 7) == 0 ? 8.0F : -8.0F; }); break;
      case 12: fill([&](int) { return static_cast<float>(random.below(5) - 2); }); break;
      default: fill([&](int) { return random.normal(); });
    }
  }
  return x;
}

// Vectors some of whose rotated coordinates lie on a decision threshold, to a few units in the last place: the first
// that differ between levels when an operation is contracted or reordered. A trellis takes them in fixed point: its
// thresholds are those of rounding.
std::vector<float> near_thresholds(const CodecInfo& info, int32_t d, uint64_t seed) {
  const std::map<std::string_view, double> units{
      {"tq2", 0.015104}, {"tq3", 0.024448}, {"tqr3", 0.025176}, {"tq4", 0.026219}};
  const double unit = info.trellis || info.bits == 1 ? 0 : units.at(info.name);
  const int half = 1 << (static_cast<int>(info.bits) - 1);
  Random random(seed);
  reference::Matrix z(kTile, d);
  for (int t = 0; t < kTile; ++t) {
    double rest = d, others = 0;
    const int chosen = d / 8;
    for (int i = 0; i < d; ++i) {
      z(t, i) = random.normal();
      if (i < chosen) {
        double threshold = 0;
        if (info.trellis) {
          threshold = (static_cast<double>(random.below(16384)) + 0.5) / 8192;
        } else if (half > 1) {
          const int k = half + static_cast<int>(random.below(half - 1));
          threshold = (reference::level(info, k) + reference::level(info, k + 1)) / 2 * unit;
        }
        z(t, i) = random.below(2) != 0 ? threshold : -threshold;
        rest -= z(t, i) * z(t, i);
      } else {
        others += z(t, i) * z(t, i);
      }
    }
    // |z|^2 = d, as in the encoder, so that the threshold is met after its division by the norm.
    if (rest > 0) z.row(t).tail(d - chosen) *= std::sqrt(rest / others);
  }
  const reference::Matrix x = z * reference::rotation(d);
  std::vector<float> out;
  for (int t = 0; t < kTile; ++t)
    for (int i = 0; i < d; ++i) out.push_back(static_cast<float>(x(t, i)));
  return out;
}

}  // namespace

TEST(bytes_are_the_same_on_every_level) {
  const bool scalar = isa_active() == "scalar";
  for (const int64_t code : inputs::codes_with_options(check::full()))
    for (const int32_t d : kHeadDims)
      for (const Side side : kSides) {
        if (inputs::skip(code, d) || check::others()) continue;
        const bool trellis = inputs::info_of(code).trellis;
        const int repeats = check::full() ? (trellis ? 5 : 200) : check::slow() || trellis ? 1 : 4;
        const check::Context context(label(code, d, side));
        for (int n = 0; n < repeats; ++n) {
          const auto seed = static_cast<uint64_t>(n * 1000 + d);
          std::vector<std::vector<float>> tiles{hard_vectors(d, seed)};
          if (inputs::info_of(code).scale_rules)
            tiles.push_back(near_thresholds(reference::first_part(inputs::info_of(code)), d, seed));
          for (const auto& x : tiles) {
            const auto here = inputs::encode(x, code, d, side);
            if (!scalar) CHECK(here == on_level("scalar", [&] { return inputs::encode(x, code, d, side); }));
          }
        }
      }
}

TEST(bytes_are_the_golden_ones) {
  struct Golden {
    int64_t code;
    int side;
    int32_t head_dim;
    uint64_t hash;
  };
  static constexpr Golden kGolden[] = {
#include "golden.inc"
  };
  std::set<std::pair<int64_t, int>> known;
  for (const Golden& g : kGolden) {
    if (g.code < 0) continue;
    known.emplace(g.code, g.side);
    if (inputs::skip(g.code, g.head_dim)) continue;
    const int32_t d = g.head_dim;
    const auto side = static_cast<Side>(g.side);
    const check::Context context(label(g.code, d, side));
    auto x = inputs::golden(d);
    if (g.code == inputs::code_of(0, Rule::stored, Dtype::bf16))  // the golden elements of bf16 are truncated
      for (float& v : x) v = std::bit_cast<float>(std::bit_cast<uint32_t>(v) & 0xffff0000U);
    // The bytes of all tiles, then the means.
    const SideLayout layout = layout_of(g.code, d, side);
    constexpr int kTiles = (inputs::kGoldenTokens + kTile - 1) / kTile;
    inputs::Bytes tiles(inputs::kGoldenRows * kTiles * layout.bytes()),
        means(static_cast<size_t>(inputs::kGoldenRows * layout.means_of(kTiles)) * layout.mean_bytes());
    const Dtype dtype = inputs::input_dtype(g.code);
    const auto rows = inputs::elements(x, dtype);
    encode_rows({rows.data(), dtype, ptrdiff_t{d} * dtype_bytes(dtype)}, inputs::kGoldenRows, inputs::kGoldenTokens,
                g.code, d, side, {tiles.data(), means.data()});
    CHECK_EQ(fnv1a(means.data(), means.size(), fnv1a(tiles.data(), tiles.size())), g.hash);
  }
  for (const int64_t code : inputs::codec_codes())  // make_golden.py knows every codec
    CHECK(known.contains({code, 0}) && known.contains({code, 1}));
  CHECK_GE(known.size(), inputs::codec_codes().size() * 2 + 4);  // and centred ones
}

TEST(records_in_pages_are_the_golden_ones) {
  constexpr int32_t d = 128;
  const PageLayout layout{inputs::code_of(5, Rule::norm), d, inputs::code_of(4, Rule::norm), d, inputs::kGoldenRows};
  const auto x = inputs::golden(d);
  constexpr int kPadded = 3 * kTile;
  std::vector<float> padded(static_cast<size_t>(inputs::kGoldenRows * kPadded * d), 0.0F);
  for (int row = 0; row < inputs::kGoldenRows; ++row)
    std::copy_n(x.begin() + row * inputs::kGoldenTokens * d, inputs::kGoldenTokens * d,
                padded.begin() + row * kPadded * d);
  inputs::Bytes page(layout.page_bytes());
  const int64_t address = reinterpret_cast<int64_t>(page.data());
  const Strided rows{reinterpret_cast<const uint8_t*>(padded.data()), 0, ptrdiff_t{kPadded} * d * 4, ptrdiff_t{d} * 4};
  encode_pages({&address, 1, 1}, layout, rows, rows, Dtype::f32, 0, 3, serial_for);
  uint64_t hash = fnv1a(nullptr, 0);
  const size_t record = layout.record().bytes();
  for (size_t head = 0; head < inputs::kGoldenRows; ++head)
    hash = fnv1a(page.data() + head * layout.record().head_bytes(), 3 * record, hash);
  static constexpr struct {
    int64_t code;
    int side;
    int32_t head_dim;
    uint64_t hash;
  } kGolden[] = {
#include "golden.inc"
  };
  CHECK_EQ(hash, std::end(kGolden)[-1].hash);
  // The slot that was not written is untouched.
  CHECK_EQ(page.data()[3 * record], uint8_t{0xff});
  // decode_pages gives what decode_tile gives, cropped tiles and all.
  const int32_t counts[] = {64, 10, 22};
  for (const Side side : kSides) {
    std::vector<float> out(static_cast<size_t>(inputs::kGoldenRows * 96 * d));
    decode_pages({&address, 1, 1}, layout, side, counts, 3, Dtype::f32, reinterpret_cast<uint8_t*>(out.data()),
                 serial_for);
    const int64_t code = side == Side::key ? layout.key_codec : layout.value_codec;
    size_t at = 0;
    for (int row = 0; row < inputs::kGoldenRows; ++row)
      for (int t = 0; t < 3; ++t) {
        const auto from = padded.begin() + (row * kPadded + t * kTile) * d;
        const auto tile = inputs::encode({from, from + kTile * d}, code, d, side);
        std::vector<float> want(static_cast<size_t>(kTile * d));
        decode_tile(tile.read(), code, d, side, kTile, reinterpret_cast<uint8_t*>(want.data()), Dtype::f32, d * 4);
        CHECK(std::memcmp(want.data(), out.data() + at, static_cast<size_t>(counts[t] * d) * 4) == 0);
        at += static_cast<size_t>(counts[t] * d);
      }
    CHECK_EQ(at, out.size());
  }
}

TEST(decoding_agrees_with_double_precision) {
  for (const int64_t code : inputs::codes_with_options(check::full()))
    for (const int32_t d : kHeadDims)
      for (const Side side : kSides) {
        if (inputs::skip(code, d) || check::others()) continue;
        const check::Context context(label(code, d, side));
        const auto tile = inputs::encode(hard_vectors(d, static_cast<uint64_t>(d) + 7), code, d, side);
        const auto want = reference::decode(tile.read(), code, d, side);
        std::vector<float> got(static_cast<size_t>(kTile * d));
        const auto decode = [&](Dtype dtype, uint8_t* out, ptrdiff_t stride) {
          decode_tile(tile.read(), code, d, side, kTile, out, dtype, stride);
        };
        decode(Dtype::f32, reinterpret_cast<uint8_t*>(got.data()), ptrdiff_t{d} * 4);
        // What is coded and the mean may cancel: errors are relative to both.
        double mean = 0;
        if (tile.layout.center != Center::none)
          for (int i = 0; i < d; ++i)
            mean += std::pow(reference::half(*tile.read().mean_scale) * tile.read().mean[i], 2);
        for (int t = 0; t < kTile; ++t) {
          double error = 0, norm = mean;
          for (int i = 0; i < d; ++i) {
            error += std::pow(got[static_cast<size_t>(t * d + i)] - want(t, i), 2);
            norm += want(t, i) * want(t, i);
          }
          // Nothing is left of vectors whose scale is below fp16: zeros must be exact.
          if (norm == 0)
            CHECK_EQ(error, 0.0);
          else
            CHECK_LE(std::sqrt(error / norm), 1e-6);
          check::measure("decode, relative error of a vector", norm == 0 ? 0 : std::sqrt(error / norm));
        }
        for (const Dtype dtype :
             {Dtype::f16, Dtype::bf16}) {  // other dtypes are the float32 result, rounded; wider rows
          const ptrdiff_t stride = d * 2 + 6;
          inputs::Bytes rows(static_cast<size_t>(stride * kTile));
          decode(dtype, rows.data(), stride);
          const auto rounded = inputs::elements(got, dtype);
          bool same = true;
          for (int t = 0; t < kTile; ++t) {
            same = same && std::memcmp(rows.data() + t * stride, rounded.data() + static_cast<ptrdiff_t>(t) * d * 2,
                                       static_cast<size_t>(d) * 2) == 0;
            same = same && rows.data()[t * stride + d * 2] == 0xff;  // the gap between rows is left alone
          }
          CHECK(same);
        }
      }
}

TEST(partial_tiles_are_filled_with_zeros) {
  for (const int64_t code : inputs::codes_with_options(check::full()))
    for (const int32_t d : kHeadDims)
      for (const Side side : kSides)
        for (const int tokens : {1, 63, 64}) {
          if (inputs::skip(code, d) || (check::slow() && tokens != 63) || check::others()) continue;
          const check::Context context(label(code, d, side), " tokens ", tokens);
          auto x = hard_vectors(d, 99);
          const auto partial = inputs::encode({x.begin(), x.begin() + tokens * d}, code, d, side, tokens);
          std::fill(x.begin() + tokens * d, x.end(), 0.0F);
          const auto whole = inputs::encode(x, code, d, side);
          CHECK(partial == whole);
          std::vector<float> decoded(x.size(), 1.0F);
          decode_tile(partial.read(), code, d, side, kTile, reinterpret_cast<uint8_t*>(decoded.data()), Dtype::f32,
                      ptrdiff_t{d} * 4);
          // A centred zero is coded like any vector; one in a live group of keys takes the nearest level.
          const int zeros = inputs::info_of(code).asymmetric && side == Side::key ? (tokens + 31) / 32 * 32 : tokens;
          if (partial.layout.center == Center::none)
            CHECK_EQ(std::count(decoded.begin() + zeros * d, decoded.end(), 0.0F), (kTile - zeros) * d);
          // Decoding some tokens writes no more than these.
          inputs::Bytes out(static_cast<size_t>((tokens + 1) * d) * 4);
          decode_tile(partial.read(), code, d, side, tokens, out.data(), Dtype::f32, ptrdiff_t{d} * 4);
          CHECK_EQ(out.data()[tokens * d * 4], uint8_t{0xff});
        }
}

TEST(inputs_of_16_bits_and_strides) {
  for (const int64_t code : inputs::codes_with_options(check::full())) {
    if (inputs::info_of(code).bits == 0) continue;
    constexpr int32_t d = 80;
    const auto x = hard_vectors(d, 5);
    for (const Dtype dtype : {Dtype::f16, Dtype::bf16, Dtype::f32}) {
      if (check::others()) continue;
      const check::Context context(label(code, d, Side::key), " input dtype ", static_cast<int>(dtype));
      const auto narrow = inputs::elements(x, dtype);
      std::vector<float> widened(x.size());
      load_row(narrow.data(), dtype, static_cast<int32_t>(x.size()), widened.data());
      const ptrdiff_t row = d * dtype_bytes(dtype), stride = 3 * row;
      inputs::Bytes strided(static_cast<size_t>(stride * kTile));
      for (int t = 0; t < kTile; ++t)
        std::memcpy(strided.data() + t * stride, narrow.data() + t * row, static_cast<size_t>(row));
      inputs::Tile tile(code, d, Side::key);
      const Vectors vectors{strided.data(), dtype, stride};
      tile.freeze(vectors, kTile, code);
      encode_tile(vectors, kTile, code, d, Side::key, tile.sections(), 0);
      CHECK(tile == inputs::encode(widened, code, d, Side::key));
    }
  }
}

TEST(projection_is_the_reference_s) {
  uint64_t hash = fnv1a(nullptr, 0);
  for (const int32_t d : kHeadDims) {
    const Projection& p = projection_of(d);
    const reference::Matrix want = reference::projection(d);
    std::vector<uint8_t> rows;
    for (int i = 0; i < d; ++i)
      for (int j = 0; j < d; ++j) {
        CHECK_EQ(p.columns[j * d + i], want(i, j));
        rows.push_back(static_cast<uint8_t>(static_cast<int8_t>(p.columns[j * d + i])));
      }
    hash = fnv1a(rows.data(), rows.size(), hash);
    CHECK_LE(std::abs(p.worth / (std::sqrt(M_PI / 2 * d) / want.norm()) - 1), 1e-6);
  }
  CHECK_EQ(hash, 0xebf141c221069b98ULL);  // of test_reference_qjl.py
}

TEST(rotation_agrees_with_the_dense_matrix) {
  for (const int32_t d : kHeadDims) {
    const check::Context context("head_dim ", d);
    constexpr int kRows = 5;
    Random random(static_cast<uint64_t>(d));
    std::vector<float> x(static_cast<size_t>(kRows * d));
    for (float& v : x) v = random.normal();
    reference::Matrix want(kRows, d);
    for (int i = 0; i < kRows * d; ++i) want.data()[i] = x[static_cast<size_t>(i)];
    const auto distance = [&](const std::vector<float>& got) {
      double error = 0;
      for (int i = 0; i < kRows * d; ++i) error += std::pow(got[static_cast<size_t>(i)] - want.data()[i], 2);
      return std::sqrt(error / want.squaredNorm());
    };
    auto y = x;
    rotate_rows(y.data(), kRows, d, false);
    rotate_rows(y.data(), kRows, d, true);
    CHECK_LE(distance(y), 1e-6);
    want = want * reference::rotation(d).transpose();
    rotate_rows(x.data(), kRows, d, false);
    CHECK_LE(distance(x), 1e-6);
    auto scalar = y;
    on_level("scalar", [&] { return rotate_rows(scalar.data(), kRows, d, false), 0; });
    rotate_rows(y.data(), kRows, d, false);
    CHECK(std::memcmp(scalar.data(), y.data(), y.size() * 4) == 0);
  }
}
