// The trellis search: the same codes on every level, those of the reference (trellis_golden.inc), for every number of
// lanes and steps, and for inputs that drive its saturating arithmetic to the ends.
#include <algorithm>
#include <string>

#include "check.h"
#include "inputs.h"
#include "kernels/table.h"
#include "kvpack/isa.h"

namespace {

using namespace kvpack;
using inputs::Random;

const char* const kNames[kTrellisCodes] = {"tcq1", "tcq2", "tcq2.5", "tcq3", "tcq3.5", "tcq4"};

struct Golden {
  const char* codec;
  int32_t steps;
  uint64_t hash;
};
constexpr Golden kGolden[] = {
#include "trellis_golden.inc"
};

// [steps][lanes]: Gaussian sequences; every eighth lane takes one of the kinds below.
std::vector<int16_t> sequences(int32_t steps, int32_t lanes, uint64_t seed) {
  Random random(seed);
  std::vector<int16_t> x(static_cast<size_t>(steps * lanes));
  for (int32_t i = 0; i < steps; ++i)
    for (int32_t l = 0; l < lanes; ++l) {
      int32_t v = inputs::field_sum(random.next()) / 4;  // deviation 9459
      switch (l) {
        case 0: v = -32768; break;
        case 8: v = 32767; break;
        case 16: v = 0; break;
        case 24: v = i % 3 == 0 ? -32768 : 32767; break;
        case 32: v = v < 0 ? -32768 : 32767; break;
        case 40: v = i == steps / 2 ? 32767 : 0; break;
        default: break;
      }
      x[static_cast<size_t>(i * lanes + l)] = static_cast<int16_t>(std::min(std::max(v, -32768), 32767));
    }
  return x;
}

std::vector<uint8_t> search(int32_t codec, const std::vector<int16_t>& x, int32_t steps, int32_t lanes) {
  inputs::Bytes work(sizeof(TrellisWork)), codes(x.size());  // exact sizes, so that the sanitizer sees a byte too many
  kernels().trellis_search[codec](x.data(), steps, lanes, codes.data(), reinterpret_cast<TrellisWork*>(work.data()));
  return {codes.data(), codes.data() + codes.size()};
}

uint64_t fnv1a(const std::vector<uint8_t>& data) {
  uint64_t hash = 0xcbf29ce484222325ULL;
  for (const uint8_t byte : data) hash = (hash ^ byte) * 0x100000001b3ULL;
  return hash;
}

}  // namespace

TEST(codes_are_those_of_the_reference) {
  for (const Golden& golden : kGolden)
    for (int32_t codec = 0; codec < kTrellisCodes; ++codec)
      if (std::string(golden.codec) == kNames[codec]) {
        const check::Context context(golden.codec, " steps ", golden.steps);
        const auto x = sequences(golden.steps, 64, static_cast<uint64_t>(golden.steps));
        CHECK_EQ(fnv1a(search(codec, x, golden.steps, 64)), golden.hash);
      }
}

TEST(codes_are_those_of_the_scalar_level) {
  const std::string level = isa_active();
  for (int32_t codec = 0; codec < kTrellisCodes; ++codec)
    for (const int32_t steps : {16, 48, 64, 112, 256})
      for (const int32_t lanes : {16, 48, 64, 80}) {
        if (check::slow() && steps * lanes > 64 * 48) continue;
        const check::Context context(kNames[codec], " steps ", steps, " lanes ", lanes);
        const auto x = sequences(steps, lanes, static_cast<uint64_t>(steps + lanes));
        const auto codes = search(codec, x, steps, lanes);
        isa_use("scalar");
        CHECK(codes == search(codec, x, steps, lanes));
        isa_use(level);
      }
}

TEST(a_sequence_does_not_depend_on_its_lane) {
  constexpr int32_t kSteps = 64;
  const auto x = sequences(kSteps, 80, 5);
  for (int32_t codec = 0; codec < kTrellisCodes; ++codec) {
    const check::Context context(kNames[codec]);
    const auto codes = search(codec, x, kSteps, 80);
    std::vector<int16_t> part;  // lanes 33 .. 48
    for (int32_t i = 0; i < kSteps; ++i) part.insert(part.end(), x.begin() + i * 80 + 33, x.begin() + i * 80 + 49);
    const auto again = search(codec, part, kSteps, 16);
    int64_t wrong = 0;
    for (int32_t i = 0; i < kSteps; ++i)
      for (int32_t l = 0; l < 16; ++l)
        wrong += codes[static_cast<size_t>(i * 80 + 33 + l)] != again[static_cast<size_t>(i * 16 + l)];
    CHECK_EQ(wrong, 0);
  }
}

TEST(codes_have_the_bits_of_their_step) {
  constexpr int32_t kEven[kTrellisCodes] = {1, 2, 2, 3, 3, 4}, kOdd[kTrellisCodes] = {1, 2, 3, 3, 4, 4};
  const auto x = sequences(128, 64, 6);
  for (int32_t codec = 0; codec < kTrellisCodes; ++codec) {
    const auto codes = search(codec, x, 128, 64);
    int64_t wrong = 0;
    for (size_t i = 0; i < codes.size(); ++i) wrong += codes[i] >> (i / 64 % 2 == 0 ? kEven[codec] : kOdd[codec]) != 0;
    const check::Context context(kNames[codec]);
    CHECK_EQ(wrong, 0);
  }
}
