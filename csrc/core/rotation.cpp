// Signs of the randomized Hadamard rotation: one seed, one vector per size, the same for keys and values. And the
// Hadamard matrices of the sizes that are no powers of two, as kernels read them.
#include <array>

#include "core/fp_control.h"
#include "core/splitmix.h"
#include "core/transform.h"
#include "kernels/hadamard.h"
#include "kernels/table.h"
#include "kvpack/codec.h"
#include "kvpack/isa.h"

namespace kvpack {
namespace {

struct Signs {
  alignas(64) std::array<float, kMaxHeadDim> value{};
  constexpr Signs() = default;
  constexpr explicit Signs(uint64_t dims) {
    SplitMix64 random{0x6b767061636b0000ULL + dims};
    uint64_t word = 0;
    for (size_t i = 0; i < dims; ++i) {
      if (i % 64 == 0) word = random.next();
      value[i] = ((word >> (i % 64)) & 1) != 0 ? -1.0F : 1.0F;
    }
  }
};

constexpr auto kSigns = [] {
  std::array<Signs, std::size(kRotatedDims)> all;
  for (size_t i = 0; i < all.size(); ++i) all[i] = Signs(static_cast<uint64_t>(kRotatedDims[i]));
  return all;
}();

}  // namespace

constexpr HadamardSigns<48> kHadamard48;
constexpr HadamardSigns<80> kHadamard80;
constexpr HadamardSigns<96> kHadamard96;
constexpr HadamardSigns<112> kHadamard112;
constexpr HadamardSigns<144> kHadamard144;
constexpr HadamardSigns<160> kHadamard160;
constexpr HadamardSigns<192> kHadamard192;

const float* signs_of(int32_t dims) {
  size_t i = 0;
  while (kRotatedDims[i] != dims) ++i;
  return kSigns[i].value.data();
}

const float* rotation_signs(int64_t head_dim) {
  (void)layout_of(0, head_dim, Side::key);  // throws for a head size that is not supported
  return signs_of(static_cast<int32_t>(head_dim));
}

void rotate_rows(float* x, int64_t rows, int64_t head_dim, bool inverse) {
  const FpControl ieee(FpControl::Mode::ieee);
  kernels().rotate(x, rows, static_cast<int32_t>(head_dim), rotation_signs(head_dim), inverse);
}

}  // namespace kvpack
