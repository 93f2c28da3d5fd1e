// Signs of the randomized Hadamard rotation: one seed, one vector per head size, the same for keys and values.
#include <array>

#include "core/fp_control.h"
#include "kernels/table.h"
#include "kvpack/codec.h"
#include "kvpack/isa.h"

namespace kvpack {
namespace {

struct Signs {
  alignas(64) std::array<float, kMaxHeadDim> value{};
  constexpr explicit Signs(uint64_t head_dim) {
    uint64_t state = 0x6b767061636b0000ULL + head_dim, word = 0;
    for (size_t i = 0; i < head_dim; ++i) {
      if (i % 64 == 0) {  // splitmix64
        state += 0x9E3779B97F4A7C15ULL;
        word = state;
        word = (word ^ (word >> 30)) * 0xBF58476D1CE4E5B9ULL;
        word = (word ^ (word >> 27)) * 0x94D049BB133111EBULL;
        word ^= word >> 31;
      }
      value[i] = ((word >> (i % 64)) & 1) != 0 ? -1.0F : 1.0F;
    }
  }
};

constexpr Signs kSigns64{64}, kSigns128{128}, kSigns256{256};

}  // namespace

const float* rotation_signs(int64_t head_dim) {
  (void)layout_of(0, head_dim, Side::key);  // throws for a head size that is not supported
  return (head_dim == 64 ? kSigns64 : head_dim == 128 ? kSigns128 : kSigns256).value.data();
}

void rotate_rows(float* x, int64_t rows, int64_t head_dim, bool inverse) {
  const FpControl ieee(FpControl::Mode::ieee);
  kernels().rotate(x, rows, static_cast<int32_t>(head_dim), rotation_signs(head_dim), inverse);
}

}  // namespace kvpack
