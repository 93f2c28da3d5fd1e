// Hadamard matrices of the sizes d = m * 2^a, m one of 1, 12, 20, 28, 36: H_d = H_m (x) H_2^a.
//
// H_12 and H_20 are of Paley's first construction (q = 11, 19), H_28 and H_36 are of his second (q = 13, 17):
//
//   q = 3 mod 4:  H = I + [[0, 1], [-1, Q]]                                       order q + 1
//   q = 1 mod 4:  H = [[0, 1], [1, Q]] (x) [[1, 1], [1, -1]] + I (x) [[1, -1], [-1, -1]]   order 2 (q + 1)
//
// with Q[a][b] the Legendre symbol of (b - a) mod q. reference/hadamard.py says the same.
#pragma once
#include "kvpack/types.h"

namespace kvpack {

// The order m of the matrix of a size.
constexpr int32_t hadamard_order(int32_t dims) {
  int32_t odd = dims;
  while (odd % 2 == 0) odd /= 2;
  return odd == 1 ? 1 : 4 * odd;
}

// 1 for squares modulo q, -1 for the others, 0 for multiples of q.
constexpr int legendre(int a, int q) {
  a = (a % q + q) % q;
  for (int i = 1; i < q && a != 0; ++i)
    if (i * i % q == a) return 1;
  return a == 0 ? 0 : -1;
}

constexpr int32_t kMaxHadamardOrder = 36;

// H_m for m of 12, 20, 28, 36; entries are 1 and -1.
struct HadamardMatrix {
  int8_t at[kMaxHadamardOrder][kMaxHadamardOrder] = {};
  constexpr explicit HadamardMatrix(int m) {
    const bool second = m == 28 || m == 36;
    const int q = second ? m / 2 - 1 : m - 1;
    for (int r = 0; r < m; ++r)
      for (int s = 0; s < m; ++s) {
        const int a = second ? r / 2 : r, b = second ? s / 2 : s;
        const int core = a == 0 && b == 0 ? 0 : a == 0 ? 1 : b == 0 ? (second ? 1 : -1) : legendre(b - a, q);
        const int eye = a == b ? 1 : 0;
        // Of the 2 x 2 blocks [[1, 1], [1, -1]] and [[1, -1], [-1, -1]].
        const bool low = r % 2 != 0, right = s % 2 != 0;
        const int value = second ? core * (low && right ? -1 : 1) + eye * (low || right ? -1 : 1) : core + eye;
        at[r][s] = static_cast<int8_t>(value);
      }
  }
};

// Columns of H_m and of its transpose, each entry repeated over the 2^a elements of its row: what is multiplied with
// row s of a vector lies side by side.
template <int32_t D>
struct HadamardSigns {
  static constexpr int32_t kOrder = hadamard_order(D);
  alignas(64) float forward[kOrder][D] = {};
  alignas(64) float transposed[kOrder][D] = {};
  constexpr HadamardSigns() {
    const HadamardMatrix h(kOrder);
    for (int s = 0; s < kOrder; ++s)
      for (int i = 0; i < D; ++i) {
        const int r = i / (D / kOrder);
        forward[s][i] = h.at[r][s];
        transposed[s][i] = h.at[s][r];
      }
  }
};

// In core/rotation.cpp: shared by all ISA units.
extern const HadamardSigns<48> kHadamard48;
extern const HadamardSigns<80> kHadamard80;
extern const HadamardSigns<96> kHadamard96;
extern const HadamardSigns<112> kHadamard112;
extern const HadamardSigns<144> kHadamard144;
extern const HadamardSigns<160> kHadamard160;
extern const HadamardSigns<192> kHadamard192;

}  // namespace kvpack
