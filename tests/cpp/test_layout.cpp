// The layout of format.h against a second reading of it: offsets, sizes, and that every bit of a code section belongs
// to exactly one code.
#include <vector>

#include "check.h"
#include "kvpack/pages.h"
#include "reference.h"

namespace {

using namespace kvpack;
constexpr Side kSides[] = {Side::key, Side::value};

}  // namespace

TEST(every_bit_belongs_to_one_code) {
  for (const int bits : {2, 3, 4, 8})
    for (const int d : kHeadDims)
      for (const Side side : kSides) {
        const check::Context context("bits ", bits, " head_dim ", d, " side ", static_cast<int>(side));
        const size_t bytes = side_layout(bits, 1, d, side, Dtype::f32).code_bytes;
        CHECK_EQ(bytes, static_cast<size_t>(kTile * d * bits / 8));
        std::vector<int> owners(bytes * 8, 0);
        for (int token = 0; token < kTile; ++token)
          for (int dim = 0; dim < d; ++dim) {
            const reference::Field f = reference::field_of(bits, side, d, token, dim);
            CHECK_EQ(f.count, bits);
            for (int i = 0; i < f.count; ++i)
              if (CHECK_LT(f.bit[i], owners.size())) ++owners[f.bit[i]];
          }
        int64_t wrong = 0;
        for (const int n : owners) wrong += n != 1;
        CHECK_EQ(wrong, 0);
      }
}

TEST(lines_cover_the_code_section_once) {
  for (const int bits : {2, 3, 4, 8})
    for (const int lanes : kHeadDims)  // also head sizes whose last superblock is not full
      for (const int depth : kHeadDims) {
        if (lanes != kTile && depth != kTile) continue;
        const check::Context context("bits ", bits, " lanes ", lanes, " depth ", depth);
        const CodeGrid grid{bits, lanes, depth};
        const auto total = static_cast<size_t>(lanes * depth * bits / 8 / kLine);
        CHECK_EQ(grid.units() * unit_dwords(bits) * 4 + (grid.shares() ? 16 : 0), depth);
        CHECK_EQ(grid.shares(), bits == 3 && depth % 32 != 0);
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
          for (int pair = 0; grid.shares() && pair < grid.lane_blocks(sb) / 2; ++pair)
            for (int plane = 0; plane < unit_lines(bits); ++plane) {
              const size_t at = grid.shared_line(sb, pair) + static_cast<size_t>(plane * kLine);
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
  for (const int bits : {2, 3, 4, 8})
    for (const int d : kHeadDims)
      for (const Side side : kSides) {
        const CodeGrid grid = side_layout(bits, 1, d, side, Dtype::f32).grid();
        int64_t wrong = 0;
        for (int token = 0; token < kTile; ++token)
          for (int dim = 0; dim < d; ++dim) {
            const int lane = side == Side::key ? token : dim, depth = side == Side::key ? dim : token;
            const int unit = depth / 4 / unit_dwords(bits);
            const size_t line = unit < grid.units() ? grid.line(lane / 64, unit, lane % 64 / 16)
                                                    : grid.shared_line(lane / 64, lane % 64 / 32);
            const reference::Field f = reference::field_of(bits, side, d, token, dim);
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
  for (const int64_t key : inputs::codec_codes())
    for (const int64_t value : inputs::codec_codes())
      for (const int64_t dk : kHeadDims)
        for (const int64_t dv : kHeadDims) {
          const check::Context context("key ", key, " ", dk, " value ", value, " ", dv);
          const PageLayout layout{key, dk, value, dv, 3};
          const RecordLayout r = layout.record();
          const auto scales = [](int64_t code, int64_t d) {
            const CodecInfo& info = inputs::info_of(code);
            return static_cast<size_t>(info.bits == 0 ? 0 : (info.rotated ? 1 : (d + 31) / 32) * 128);
          };
          const auto codes = [](int64_t code, int64_t d) {
            const CodecInfo& info = inputs::info_of(code);
            return static_cast<size_t>(
                64 * d * (info.bits == 0 ? 8 * dtype_bytes(CodecCode::unpack(code).dtype) : info.bits) / 8);
          };
          CHECK_EQ(r.key_scales(), size_t{0});
          CHECK_EQ(r.value_scales(), scales(key, dk));
          CHECK_EQ(r.key_mean(), scales(key, dk) + scales(value, dv));
          CHECK_EQ(r.value_mean(), r.key_mean());
          CHECK_EQ(r.key_codes(), r.key_mean());
          CHECK_EQ(r.value_codes(), r.key_codes() + codes(key, dk));
          CHECK_EQ(r.bytes(), r.value_codes() + codes(value, dv));
          CHECK_EQ(r.bytes() % kLine, size_t{0});
          CHECK_EQ(layout.page_bytes(), 3 * kPageTiles * r.bytes());
        }
}
