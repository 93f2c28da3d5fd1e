// Maps of split codecs: which channels they choose, when they are frozen, and where they lie.
#include <algorithm>
#include <numeric>
#include <set>

#include "check.h"
#include "kvpack/pages.h"
#include "reference.h"

namespace {

using namespace kvpack;
using inputs::Random;
constexpr Side kSides[] = {Side::key, Side::value};
constexpr int32_t kTiles = 6, kHeads = 2;

int64_t code_of(const CodecInfo& info, Center center) { return inputs::default_code(info, Dtype::f32, center); }

std::vector<int> channels(const uint8_t* map, int32_t d) {
  std::vector<int> out;
  for (int i = 0; i < d; ++i)
    if ((map[i / 8] >> (i % 8) & 1) != 0) out.push_back(i);
  return out;
}

// [head][token][dim], `padding` tokens of zeros first; some channels of each head are large, others from tile 3 on.
std::vector<float> rows_of(int32_t d, int32_t padding, float size, uint64_t seed, std::set<int>* large = nullptr) {
  Random random(seed);
  std::vector<float> x;
  for (int h = 0; h < kHeads; ++h) {
    std::set<int> first, later;
    while (static_cast<int>(first.size()) < reference::outliers(d)) first.insert(static_cast<int>(random.below(d)));
    while (static_cast<int>(later.size()) < reference::outliers(d)) later.insert(static_cast<int>(random.below(d)));
    if (large != nullptr) large[h] = first;
    for (int t = 0; t < kTiles * kTile; ++t)
      for (int i = 0; i < d; ++i) {
        const auto& now = t < std::max(padding + kTile, 3 * kTile) ? first : later;
        x.push_back(t < padding ? 0.0F : size * random.normal() * (now.contains(i) ? 8.0F : 1.0F));
      }
  }
  return x;
}

template <class Body>
void for_split(Body&& body) {
  for (const CodecInfo& info : codecs())
    if (info.split)
      for (const int32_t d : kHeadDims)
        for (const Side side : kSides) {
          const check::Context context(info.name, " head_dim ", d, " side ", static_cast<int>(side));
          body(info, d, side);
        }
}

}  // namespace

TEST(a_map_is_of_the_largest_channels) {
  for_split([](const CodecInfo& info, int32_t d, Side side) {
    for (const float size : {1.0F, 1e-20F, 0x1p-140F, 1e3F}) {  // squares that would underflow
      std::set<int> large[kHeads];
      auto x = rows_of(d, 3, size, static_cast<uint64_t>(d), large);
      x.resize(static_cast<size_t>(kTile * d));
      const auto tile = inputs::encode(x, code_of(info, Center::none), d, side);
      const auto got = channels(tile.read().map, d);
      CHECK(std::set<int>(got.begin(), got.end()) == large[0]);
    }
    // Of equal channels the lower ones; of zeros none.
    const std::vector<float> same(static_cast<size_t>(kTile * d), -2.0F), zeros(same.size(), -0.0F);
    const auto tile = inputs::encode(same, code_of(info, Center::none), d, side);
    std::vector<int> lowest(static_cast<size_t>(reference::outliers(d)));
    std::iota(lowest.begin(), lowest.end(), 0);
    CHECK(channels(tile.read().map, d) == lowest);
    const auto none = inputs::encode(zeros, code_of(info, Center::mean), d, side);
    CHECK(channels(none.read().map, d).empty());
    CHECK(reference::decode(none.read(), code_of(info, Center::mean), d, side).isZero(0));
  });
}

TEST(a_map_is_frozen_for_the_row) {
  for_split([](const CodecInfo& info, int32_t d, Side side) {
    if (!check::full() && d != 80 && d != 128) return;
    for (const Center center : {Center::none, Center::mean, Center::tile})
      for (const int32_t padding : {0, 70, 300}) {
        const int64_t code = code_of(info, center);
        const check::Context context("centre ", static_cast<int>(center), " padding ", padding);
        std::set<int> large[kHeads];
        const auto x = rows_of(d, padding, 1.0F, 7, large);
        const auto* bytes = reinterpret_cast<const uint8_t*>(x.data());
        const ptrdiff_t row = ptrdiff_t{d} * 4;
        const SideLayout own = layout_of(code, d, side);
        inputs::Bytes tiles(kHeads * kTiles * own.bytes()),
            means(static_cast<size_t>(kHeads * own.means_of(kTiles)) * own.mean_bytes());
        encode_rows({bytes, Dtype::f32, row}, kHeads, kTiles * kTile, code, d, side, {tiles.data(), means.data()});
        // As one call makes pages, and calls of 1, 2 and 3 tiles.
        const PageLayout layout{code, d, code, d, kHeads};
        const RecordLayout record = layout.record();
        std::vector<inputs::Bytes> pages;
        std::vector<int64_t> table;
        for (int i = 0; i < 4; ++i) {
          pages.emplace_back(layout.page_bytes());
          table.push_back(reinterpret_cast<int64_t>(pages.back().data()));
        }
        const auto encode = [&](const int64_t* at, int32_t first, int32_t n) {
          const Strided rows{bytes + first * kTile * row, 0, kTiles * kTile * row, row};
          encode_pages({at, 1, 2}, layout, rows, rows, Dtype::f32, first, n, serial_for);
        };
        encode(table.data(), 0, kTiles);
        for (const auto& [first, n] : {std::pair{0, 1}, {1, 2}, {3, 3}}) encode(table.data() + 2, first, n);
        for (int64_t head = 0; head < kHeads; ++head) {
          for (size_t page = 0; page < 4; ++page) {
            const uint8_t* map =
                pages[page].data() + static_cast<size_t>(head) * record.head_bytes() + record.map(side);
            const bool known = padding < 256 || page % 2 == 1;
            const auto got = channels(map, d);
            CHECK(std::set<int>(got.begin(), got.end()) == (known ? large[head] : std::set<int>{}));
          }
          for (int64_t t = 0; t < kTiles; ++t) {
            const uint8_t* part =
                pages[static_cast<size_t>(t / kPageTiles)].data() + static_cast<size_t>(head) * record.head_bytes();
            const uint8_t* slot = part + static_cast<size_t>(t % kPageTiles) * record.bytes();
            const uint8_t* tile = tiles.data() + static_cast<size_t>(head * kTiles + t) * own.bytes();
            const uint8_t* entry =
                means.data() + static_cast<size_t>(head * own.means_of(kTiles) + own.mean_of(t)) * own.mean_bytes();
            const bool key = side == Side::key;
            CHECK(std::memcmp(slot + (key ? record.key_scales() : record.value_scales()), tile, own.scale_bytes) == 0);
            CHECK(std::memcmp(slot + (key ? record.key_codes() : record.value_codes()), tile + own.scale_bytes,
                              own.code_bytes) == 0);
            if (t * kTile + kTile > padding)
              CHECK(std::memcmp(part + record.map(side), entry + own.map_at(), own.map_bytes) == 0);
            if (center == Center::none) continue;
            CHECK(std::memcmp(part + record.mean(side, t % kPageTiles), entry, static_cast<size_t>(d)) == 0);
            CHECK(std::memcmp(part + record.mean_scale(side, t % kPageTiles), entry + d, 2) == 0);
          }
        }
        std::vector<float> got(x.size());
        decode_rows({tiles.data(), means.data()}, kHeads, kTiles * kTile, code, d, side,
                    reinterpret_cast<uint8_t*>(got.data()), Dtype::f32);
        double error = 0, all = 0;
        for (size_t i = 0; i < x.size(); ++i) {
          error += std::pow(got[i] - x[i], 2);
          all += std::pow(x[i], 2);
        }
        CHECK_LE(error, 0.12 * all);  // the channels that are large later have fewer bits
      }
  });
}

TEST(maps_follow_the_means) {
  for_split([](const CodecInfo& info, int32_t d, Side) {
    for (const Center center : {Center::none, Center::mean, Center::tile}) {
      const int64_t code = code_of(info, center), plain = inputs::code_of(5, Rule::norm, Dtype::f32, Center::tile);
      const int count = center == Center::tile ? 4 : center == Center::mean ? 1 : 0;
      const auto means = [&](int n) { return static_cast<size_t>(n * (d + 2)); };
      const auto maps = static_cast<size_t>(d / 8);
      const RecordLayout both = PageLayout{code, d, code, d, 1}.record();
      CHECK_EQ(both.map(Side::key), both.means() + means(2 * count));
      CHECK_EQ(both.map(Side::value), both.means() + means(2 * count) + maps);
      CHECK_EQ(both.means_bytes(), (means(2 * count) + 2 * maps + 63) / 64 * 64);
      const RecordLayout values = PageLayout{plain, d, code, d, 1}.record();
      CHECK_EQ(values.map(Side::value), values.means() + means(4 + count));
      CHECK_EQ(values.means_bytes(), (means(4 + count) + maps + 63) / 64 * 64);
      CHECK_EQ(both.key.means_of(9), center == Center::tile ? 9 : 3);
      CHECK_EQ(both.key.mean_bytes(), (center == Center::none ? 0 : means(1)) + maps);
    }
  });
}

TEST(first_bad_token_of_either_part_is_named) {
  for_split([](const CodecInfo& info, int32_t d, Side side) {
    std::vector<float> x(static_cast<size_t>(kTile * d), 1.0F);
    for (int i = 0; i < d; ++i) {
      x[static_cast<size_t>(9 * d + i)] = i < reference::outliers(d) ? 1e30F : 0.0F;
      x[static_cast<size_t>(5 * d + i)] = i < reference::outliers(d) ? 0.0F : 1e30F;
    }
    CHECK_THROWS(inputs::encode(x, code_of(info, Center::none), d, side), "token 5 ", std::string(info.name));
    x[static_cast<size_t>(40 * d)] = INFINITY;
    x[static_cast<size_t>(30 * d + d - 1)] = INFINITY;
    CHECK_THROWS(inputs::encode(x, code_of(info, Center::none), d, side), "NaN or Inf", "token 30 ");
  });
}
