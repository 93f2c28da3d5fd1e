// The layout of format.h against a second reading of it: offsets, sizes, and that every bit of a code section belongs
// to exactly one code.
#include <vector>

#include "check.h"
#include "kvpack/pages.h"
#include "reference.h"

namespace {

using namespace kvpack;
constexpr Side kSides[] = {Side::key, Side::value};

// Widths, and whether codes of 3 bits are a stream.
constexpr std::pair<double, bool> kWidths[] = {{1, false},  {2, false}, {2.5, true}, {3, false}, {3, true},
                                               {3.5, true}, {4, false}, {5, false},  {8, false}};

}  // namespace

TEST(every_bit_belongs_to_one_code) {
  for (const auto& [bits, stream] : kWidths)
    for (const int d : kHeadDims)
      for (const Side side : kSides) {
        const check::Context context("bits ", bits, " head_dim ", d, " side ", static_cast<int>(side));
        const auto bytes = static_cast<size_t>(8 * d * bits);
        std::vector<int> owners(bytes * 8, 0);
        for (int token = 0; token < kTile; ++token)
          for (int dim = 0; dim < d; ++dim) {
            const reference::Field f = reference::field_of(bits, side, d, token, dim, stream);
            const int odd = (side == Side::key ? dim : token) / 4 % 2;
            CHECK_EQ(f.count, static_cast<int>(odd != 0 ? std::ceil(bits) : std::floor(bits)));
            for (int i = 0; i < f.count; ++i)
              if (CHECK_LT(f.bit[i], owners.size())) ++owners[f.bit[i]];
          }
        int64_t wrong = 0;
        for (const int n : owners) wrong += n != 1;
        CHECK_EQ(wrong, 0);
      }
}

TEST(lines_cover_the_code_section_once) {
  for (const double bits : {1.0, 2.0, 2.5, 3.0, 3.5, 4.0, 5.0, 8.0})
    for (const int lanes : kHeadDims)  // also head sizes whose last superblock is not full
      for (const int depth : kHeadDims) {
        if (lanes != kTile && depth != kTile) continue;
        const check::Context context("bits ", bits, " lanes ", lanes, " depth ", depth);
        const CodeGrid grid{bits, lanes, depth};
        const auto total = static_cast<size_t>(lanes * depth * bits / 8 / kLine);
        CHECK_EQ(grid.units() * unit_dwords(bits) * 4 + grid.parts() * 16, depth);
        const int unit_depth = half_bit(bits) ? 64 : bits == 1 || bits == 3 || bits == 5 ? 32 : 16;
        CHECK_EQ(grid.parts(), depth % unit_depth / 16);
        std::vector<int> seen(total, 0);
        int blocks = 0;
        for (int sb = 0; sb < grid.superblocks(); ++sb) {
          blocks += grid.lane_blocks(sb);
          for (int unit = 0; unit < grid.units(); ++unit)
            for (int block = 0; block < grid.lane_blocks(sb); ++block)
              for (int plane = 0; plane < unit_lines(bits); ++plane) {
                const size_t at = grid.line(sb, unit, block) + static_cast<size_t>(plane * kLine);
                CHECK_EQ(at % kLine, size_t{0});
                if (CHECK_LT(at / kLine, total)) ++seen[at / kLine];
              }
          for (int part = 0; part < grid.parts(); ++part)
            for (int block = 0; block < grid.lane_blocks(sb); block += unit_sharers(bits))
              for (int plane = 0; plane < unit_lines(bits); ++plane) {
                const size_t at = grid.shared_line(sb, part, block) + static_cast<size_t>(plane * kLine);
                if (CHECK_LT(at / kLine, total)) ++seen[at / kLine];
              }
        }
        CHECK_EQ(blocks, lanes / 16);
        int64_t wrong = 0;
        for (const int n : seen) wrong += n != 1;
        CHECK_EQ(wrong, 0);
      }
}

TEST(lines_are_where_the_fields_are) {
  for (const auto& [bits, stream] : kWidths)
    for (const int d : kHeadDims)
      for (const Side side : kSides) {
        const CodeGrid grid = code_grid(bits, d, side);
        int64_t wrong = 0;
        for (int token = 0; token < kTile; ++token)
          for (int dim = 0; dim < d; ++dim) {
            const int lane = side == Side::key ? token : dim, depth = side == Side::key ? dim : token;
            const int unit = depth / 4 / unit_dwords(bits), part = depth % (4 * unit_dwords(bits)) / 16;
            const size_t line = unit < grid.units() ? grid.line(lane / 64, unit, lane % 64 / 16)
                                                    : grid.shared_line(lane / 64, part, lane % 64 / 16);
            const reference::Field f = reference::field_of(bits, side, d, token, dim, stream);
            for (int i = 0; i < f.count; ++i) {
              const size_t byte = f.bit[i] / 8;
              wrong += byte < line || byte >= line + static_cast<size_t>(unit_lines(bits) * kLine) ||
                       byte % kLine != static_cast<size_t>(lane % 16 * 4 + depth % 4);
            }
          }
        const check::Context context("bits ", bits, " head_dim ", d, " side ", static_cast<int>(side));
        CHECK_EQ(wrong, 0);
      }
}

TEST(sections_of_records) {
  const auto codes = inputs::codes_with_options(false);
  for (const int64_t key : codes)
    for (const int64_t value : codes)
      for (const int64_t dk : kHeadDims)
        for (const int64_t dv : kHeadDims) {
          if (!check::full() && dk != dv && dk != 80) continue;
          const check::Context context("key ", key, " ", dk, " value ", value, " ", dv);
          const PageLayout layout{key, dk, value, dv, 3};
          const RecordLayout r = layout.record();
          const auto scales = [](int64_t code, int64_t d, Side side) {
            const CodecInfo& info = inputs::info_of(code);
            if (info.asymmetric) return static_cast<size_t>(side == Side::key ? 8 * d : (d + 31) / 32 * 256);
            return static_cast<size_t>(info.bits == 0 ? 0 : (info.scale_block == 0 ? info.parts : (d + 31) / 32) * 128);
          };
          const auto sizes = [](int64_t code, int64_t d) {
            const CodecInfo& info = inputs::info_of(code);
            if (info.split)
              return static_cast<size_t>(8 *
                                         (d * static_cast<int>(info.bits) + reference::outliers(static_cast<int>(d))));
            return static_cast<size_t>(8 * static_cast<double>(d) *
                                       (info.bits == 0 ? 8 * dtype_bytes(CodecCode::unpack(code).dtype) : info.bits));
          };
          CHECK_EQ(r.key_scales(), size_t{0});
          CHECK_EQ(r.value_scales(), scales(key, dk, Side::key));
          CHECK_EQ(r.key_codes(), r.value_scales() + scales(value, dv, Side::value));
          CHECK_EQ(r.value_codes(), r.key_codes() + sizes(key, dk));
          CHECK_EQ(r.bytes(), r.value_codes() + sizes(value, dv));
          CHECK_EQ(r.bytes() % kLine, size_t{0});
          CHECK_EQ(r.means(), 4 * r.bytes());
          CHECK_EQ(r.head_bytes() % kLine, size_t{0});
          CHECK_EQ(layout.page_bytes(), 3 * r.head_bytes());
        }
}

TEST(parts_follow_each_other) {
  for (const CodecInfo& info : codecs())
    for (const int32_t d : kHeadDims)
      for (const Side side : kSides) {
        const check::Context context(info.name, " head_dim ", d);
        const SideLayout s = layout_of(inputs::default_code(info), d, side);
        CHECK_EQ(s.parts, info.parts);
        int32_t first = 0;
        double bits = 0;
        size_t codes = 0, scales = 0;
        for (int32_t n = 0; n < s.parts; ++n) {
          const CodePart& part = s.part[n];
          CHECK_EQ(part.first, first);
          CHECK_EQ(part.codes, codes);
          CHECK_EQ(part.scales, scales);
          CHECK_EQ(inputs::info_of(part.reader).parts, 1);
          first += part.dims;
          bits += inputs::info_of(part.reader).bits * (info.split ? (n == 0 ? 0.25 : 0.75) : 1);
          codes += static_cast<size_t>(8 * part.dims * inputs::info_of(part.reader).bits);
          scales += kTile;
        }
        CHECK_EQ(s.width(), info.projected ? 2 * d : d);
        CHECK_EQ(bits, info.bits);
        if (info.parts > 1) CHECK_EQ(s.scale_bytes, 2 * scales);
        if (info.bits != 0) CHECK_EQ(s.code_bytes, codes);
      }
}

TEST(means_follow_the_records) {
  const auto means = [](Center c) { return c == Center::tile ? 4 : c == Center::mean ? 1 : 0; };
  for (const Center key : {Center::none, Center::mean, Center::tile})
    for (const Center value : {Center::none, Center::mean, Center::tile})
      for (const int32_t dk : kHeadDims)
        for (const int32_t dv : kHeadDims) {
          const check::Context context("centres ", static_cast<int>(key), ' ', static_cast<int>(value), " dims ", dk,
                                       ' ', dv);
          const RecordLayout r = PageLayout{inputs::code_of(5, Rule::norm, Dtype::f32, key), dk,
                                            inputs::code_of(13, Rule::mse, Dtype::f32, value), dv, 1}
                                     .record();
          const int nk = means(key), nv = means(value), used = nk * (dk + 2) + nv * (dv + 2);
          CHECK_EQ(r.head_bytes() - r.means(), static_cast<size_t>((used + 63) / 64 * 64));
          // | K means | V means | K scales | V scales |, a slot's own or the one of the row.
          const auto at = [&](int offset) { return r.means() + static_cast<size_t>(offset); };
          for (int slot = 0; slot < kPageTiles; ++slot) {
            const int k = key == Center::tile ? slot : 0, v = value == Center::tile ? slot : 0;
            if (nk != 0) CHECK_EQ(r.mean(Side::key, slot), at(k * dk));
            if (nv != 0) CHECK_EQ(r.mean(Side::value, slot), at(nk * dk + v * dv));
            if (nk != 0) CHECK_EQ(r.mean_scale(Side::key, slot), at(nk * dk + nv * dv + 2 * k));
            if (nv != 0) CHECK_EQ(r.mean_scale(Side::value, slot), at(nk * dk + nv * dv + 2 * (nk + v)));
          }
          // Standing alone: one mean a tile, or one for every four.
          CHECK_EQ(r.key.means_of(9), key == Center::tile ? 9 : key == Center::mean ? 3 : 0);
        }
}
