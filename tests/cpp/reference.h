// Decoding in double precision, from the words of the format alone: field positions, levels and signs are written here
// a second time, and the rotation is a dense Hadamard matrix. Shares no code with csrc but the type names and, as data,
// the trained levels of the trellis codecs.
#pragma once
#include <Eigen/Core>
#include <algorithm>
#include <bit>
#include <map>

#include "codecs/trellis.h"
#include "inputs.h"

namespace reference {

using namespace kvpack;
using Matrix = Eigen::Matrix<double, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;

// Where the bits of one code lie: up to eight bits, least significant first, as bit numbers in the code section.
struct Field {
  int count;
  size_t bit[8];
};

// stream: codes of 3 bits one after the other, those of a trellis. At 2.5 and 3.5 bits, codes of the odd dwords have
// one bit more than those of the even ones.
inline Field field_of(double bits, Side side, int head_dim, int token, int dim, bool stream = false) {
  const int lane = side == Side::key ? token : dim, depth = side == Side::key ? dim : token;
  const int lanes = side == Side::key ? 64 : head_dim, depths = side == Side::key ? head_dim : 64;
  const bool mixed = bits != std::floor(bits);
  const int dwords = mixed ? 16 : bits == 8 ? 1 : bits == 4 ? 2 : bits == 2 ? 4 : 8;
  const int planes = dwords < 8 || bits == 1 ? 1 : static_cast<int>(bits * dwords / 8);
  const int units = depths / (4 * dwords), whole = units * 4 * dwords;
  const int superblock = lane / 64, block = lane % 64 / 16, blocks = std::min(4, (lanes - 64 * superblock) / 16);
  // Past the whole units, 2 or 4 lane blocks have one unit for every four dwords: the first block its dwords 0..3, the
  // next one 4..7, ...
  const bool shared = depth >= whole;
  const int sharers = dwords / 4, z = (depth - whole) / 4;
  const int unit = depth / 4 / dwords, j = shared ? z % 4 + block % sharers * 4 : depth / 4 % dwords;
  const auto bit = [&](int plane, int of_byte) {
    const int line = (unit * blocks + (shared ? (z / 4 * blocks + block) / sharers : block)) * planes + plane;
    const size_t byte = static_cast<size_t>(superblock) * static_cast<size_t>(64 * depths * bits / 8) +
                        static_cast<size_t>(line * 64 + lane % 16 * 4 + depth % 4);
    return byte * 8 + static_cast<size_t>(of_byte);
  };
  const int run = static_cast<int>(std::floor(bits * j));
  Field f{static_cast<int>(mixed && j % 2 != 0 ? std::ceil(bits) : std::floor(bits)), {}};
  for (int i = 0; i < f.count; ++i) {
    const int of_run = run + i, of_six = 3 * (j - 6) + i;
    if (bits == 5)
      f.bit[i] = i == 4 ? bit(4, j) : bit(j / 2, 4 * (j % 2) + i);
    else if (bits != 3 || stream)
      f.bit[i] = bit(of_run / 8, of_run % 8);
    else
      f.bit[i] = j < 6 ? bit(j / 2, 3 * (j % 2) + i) : bit(of_six / 2, 6 + of_six % 2);
  }
  return f;
}

inline int code_at(const uint8_t* codes, double bits, Side side, int head_dim, int token, int dim,
                   bool stream = false) {
  const Field f = field_of(bits, side, head_dim, token, dim, stream);
  int code = 0;
  for (int i = 0; i < f.count; ++i) code |= (codes[f.bit[i] / 8] >> (f.bit[i] % 8) & 1) << i;
  return code;
}

inline double half(uint16_t h) {
  const int exponent = h >> 10 & 31, fraction = h & 1023;
  const double magnitude = exponent == 31  ? (fraction != 0 ? std::nan("") : INFINITY)
                           : exponent == 0 ? std::ldexp(fraction, -24)
                                           : std::ldexp(1024 + fraction, exponent - 25);
  return (h & 0x8000) != 0 ? -magnitude : magnitude;
}

inline double element(const uint8_t* at, Dtype dtype) {
  uint32_t bits = 0;
  std::memcpy(&bits, at, static_cast<size_t>(dtype_bytes(dtype)));
  if (dtype == Dtype::f16) return half(static_cast<uint16_t>(bits));
  return std::bit_cast<float>(dtype == Dtype::bf16 ? bits << 16 : bits);
}

inline double e4m3(uint8_t code) {
  const int exponent = code >> 3 & 15, fraction = code & 7;
  const double magnitude = std::ldexp(exponent == 0 ? fraction : 8 + fraction, std::max(exponent, 1) - 10);
  return (code & 0x80) != 0 ? -magnitude : magnitude;
}

// The Lloyd-Max codec in a codec of two parts: tq1 of tqp2, tq2 of tq2.5, and so on; codecs of one part are their own.
inline const CodecInfo& first_part(const CodecInfo& info) {
  const std::string name = "tq" + std::to_string(static_cast<int>(info.bits) - (info.split ? 0 : 1));
  return info.parts == 1
             ? info
             : *std::find_if(codecs().begin(), codecs().end(), [&](const CodecInfo& c) { return c.name == name; });
}

// Levels of codecs of one part, without a trellis.
inline double level(const CodecInfo& info, int code) {
  static const std::map<std::string_view, std::vector<int>> positive{{"tq1", {100}},
                                                                     {"tq2", {30, 100}},
                                                                     {"tq3", {10, 31, 55, 88}},
                                                                     {"tqr3", {7, 29, 49, 71}},
                                                                     {"tq4", {5, 15, 25, 36, 48, 62, 79, 104}}};
  const int middle = 1 << (static_cast<int>(info.bits) - 1);
  const auto book = positive.find(info.name);
  if (book == positive.end()) return code - middle;
  return code >= middle ? book->second[static_cast<size_t>(code - middle)]
                        : -book->second[static_cast<size_t>(middle - 1 - code)];
}

inline const TrellisLevels& trellis_levels(double bits) {
  static const std::map<double, const TrellisLevels*> levels{{1, &kTcq1Levels},    {2, &kTcq2Levels},
                                                             {2.5, &kTcq25Levels}, {3, &kTcq3Levels},
                                                             {3.5, &kTcq35Levels}, {4, &kTcq4Levels}};
  return *levels.at(bits);
}

// Levels of one side of a tile, [64][head_dim]. The codes of a lane make a circle of bits, in the order of depths 0, 4,
// 8, ..., 1, 5, 9, ...; a level is looked up with the seven bits before the last one of its code, and is negative where
// that last bit and the one before the seven differ. Codes of odd steps may be a bit longer, with a table of their own.
inline Matrix trellis(const uint8_t* codes, double bits, Side side, int d) {
  const int depths = side == Side::key ? d : kTile, lanes = side == Side::key ? kTile : d;
  const int even = static_cast<int>(std::floor(bits)), odd = static_cast<int>(std::ceil(bits));
  const int length = depths / 2 * (even + odd);
  Matrix out(kTile, d);
  std::vector<int> circle(static_cast<size_t>(length));
  for (int lane = 0; lane < lanes; ++lane) {
    const auto each = [&](auto&& body) {
      int step = 0;
      for (int column = 0; column < 4; ++column)
        for (int depth = column; depth < depths; depth += 4, ++step)
          side == Side::key ? body(step, lane, depth) : body(step, depth, lane);
    };
    const auto first = [&](int step) { return step / 2 * (even + odd) + step % 2 * even; };
    each([&](int step, int token, int dim) {
      const int code = code_at(codes, bits, side, d, token, dim, true);
      for (int i = first(step); i < first(step + 1); ++i)
        circle[static_cast<size_t>(i)] = code >> (i - first(step)) & 1;
    });
    each([&](int step, int token, int dim) {
      const int last = first(step + 1) - 1;
      const auto back = [&](int n) { return circle[static_cast<size_t>((last - n + length) % length)]; };
      const int8_t* table = trellis_levels(bits).level[even != odd && step % 2 != 0 ? 1 : 0];
      int index = 0;
      for (int n = 1; n <= 7; ++n) index = index * 2 + back(n);
      out(token, dim) = back(0) != back(8) ? -table[index] : table[index];
    });
  }
  return out;
}

// Whether a is a square modulo the prime q, by Euler's criterion: 1, -1, or 0 for multiples of q.
inline int residue(int a, int q) {
  int power = 1;
  for (int i = 0; i < (q - 1) / 2; ++i) power = power * (a + q) % q;
  return power == q - 1 ? -1 : power;
}

// H_m(r, s) of the orders 1, 12, 20 (Paley's first construction), 28 and 36 (his second).
inline double order_m(int m, int r, int s) {
  if (m == 1) return 1;
  const auto bordered = [](int q, int corner, int a, int b) {
    return a > 0 && b > 0 ? residue(b - a, q) : a == b ? 0 : a == 0 ? 1 : corner;
  };
  if (m < 28) return bordered(m - 1, -1, r, s) + (r == s);
  static constexpr int kOfSymbol[2][2] = {{1, 1}, {1, -1}}, kOfDiagonal[2][2] = {{1, -1}, {-1, -1}};
  return bordered(m / 2 - 1, 1, r / 2, s / 2) * kOfSymbol[r % 2][s % 2] +
         (r / 2 == s / 2 ? kOfDiagonal[r % 2][s % 2] : 0);
}

// The orthonormal randomized Hadamard rotation R = H diag(s) / sqrt(d), H the Kronecker product of H_m and a Sylvester
// matrix.
inline const Matrix& rotation(int d) {
  static std::map<int, Matrix> all;
  const auto [at, fresh] = all.try_emplace(d, d, d);
  if (fresh) {
    const int m = d % 9 == 0 ? 36 : d % 7 == 0 ? 28 : d % 5 == 0 ? 20 : d % 3 == 0 ? 12 : 1, n = d / m;
    uint64_t state = 0x6b767061636b0000ULL + static_cast<uint64_t>(d), word = 0;
    for (int column = 0; column < d; ++column) {
      if (column % 64 == 0) word = inputs::splitmix64(state += inputs::kGamma);
      const double sign = (word >> (column % 64) & 1) != 0 ? -1.0 : 1.0;
      for (int row = 0; row < d; ++row)
        at->second(row, column) = (std::popcount(static_cast<unsigned>(row % n & column % n)) % 2 != 0 ? -sign : sign) *
                                  order_m(m, row / n, column / n) / std::sqrt(d);
    }
  }
  return at->second;
}

// The Gaussian matrix of projected residuals: integers from 16 bits each, a sign and the quantile of a magnitude.
inline Matrix projection(int d) {
  Matrix g(d, d);
  uint64_t state = 0x716a6c70726f8000ULL + static_cast<uint64_t>(d), word = 0;
  for (int i = 0; i < d * d; ++i) {
    if (i % 4 == 0) word = inputs::splitmix64(state += inputs::kGamma);
    const auto field = static_cast<int>(word >> (16 * (i % 4)) & 0xffff);
    int size = 0;
    while (size < 127 && (field & 0x7fff) >= std::round(std::ldexp(std::erf((size + 0.5) / 32 * M_SQRT1_2), 15)))
      ++size;
    g(i / d, i % d) = field >= 0x8000 ? -size : size;
  }
  return g;
}

// Decoded residuals of one side of a tile, in the rotated domain: the signs of their projections, and their root
// mean squares.
inline Matrix residuals(const uint8_t* codes, const uint16_t* sizes, int d, Side side) {
  static std::map<int, Matrix> all;
  const auto [at, fresh] = all.try_emplace(d);
  if (fresh) {
    at->second = projection(d);
    at->second *= std::sqrt(M_PI / 2 / d) / std::sqrt(at->second.squaredNorm() / d / d);
  }
  Matrix signs(kTile, d);
  for (int t = 0; t < kTile; ++t)
    for (int i = 0; i < d; ++i) signs(t, i) = code_at(codes, 1, side, d, t, i) != 0 ? half(sizes[t]) : -half(sizes[t]);
  return signs * at->second;
}

// How many channels of a head are outliers: a quarter, in blocks of 16, halves to even.
inline int outliers(int d) { return 16 * static_cast<int>(std::nearbyint(d / 64.0)); }

// Tiles of split codecs: two vectors of Lloyd-Max codes, of the channels in the map and of those that are not.
inline Matrix split(const ConstTileSide& tile, const CodecInfo& info, Center center, int d, Side side) {
  Matrix x(kTile, d);
  const uint8_t* codes = tile.codes;
  int first = 0;
  for (const int part : {0, 1}) {
    const int dims = part == 0 ? outliers(d) : d - outliers(d), bits = static_cast<int>(info.bits) + 1 - part;
    const std::string name = "tq" + std::to_string(bits);
    const CodecInfo& own =
        *std::find_if(codecs().begin(), codecs().end(), [&](const CodecInfo& c) { return c.name == name; });
    Matrix y(kTile, dims);
    for (int t = 0; t < kTile; ++t)
      for (int i = 0; i < dims; ++i) {
        y(t, i) = level(own, code_at(codes, bits, side, dims, t, i)) * half(tile.scales[part * kTile + t]);
        if (center != Center::none) y(t, i) += half(*tile.mean_scale) * tile.mean[first + i];
      }
    y = y * rotation(dims);
    const bool none = std::all_of(tile.map, tile.map + d / 8, [](uint8_t b) { return b == 0; });
    int i = 0;
    for (int channel = 0; channel < d; ++channel) {
      const bool outlier = none ? channel < outliers(d) : (tile.map[channel / 8] >> channel % 8 & 1) != 0;
      if (outlier == (part == 0)) x.col(channel) = y.col(i++);
    }
    codes += 8 * dims * bits;
    first += dims;
  }
  return x;
}

// All 64 vectors of one side of a tile: [64][head_dim].
inline Matrix decode(const ConstTileSide& tile, int64_t codec, int d, Side side) {
  const CodecCode code = CodecCode::unpack(codec);
  const CodecInfo& info = inputs::info_of(codec);
  if (info.split) return split(tile, info, code.center, d, side);
  const CodecInfo& first = first_part(info);
  const int per_scale = info.scale_block == 0 ? d : info.scale_block;
  Matrix x(kTile, d);
  if (info.trellis) x = trellis(tile.codes, info.bits, side, d);
  for (int t = 0; t < kTile; ++t)
    for (int i = 0; i < d; ++i) {
      const int at = side == Side::key ? i * kTile + t : t * d + i;
      if (info.bits == 0) {
        x(t, i) = element(tile.codes + at * dtype_bytes(code.dtype), code.dtype);
        continue;
      }
      if (info.elements) {
        x(t, i) = e4m3(tile.codes[at]) * half(tile.scales[t]);
        continue;
      }
      if (info.asymmetric) {  // steps, then as many zeros
        const int step = side == Side::key ? t / 32 * d + i : i / 32 * kTile + t;
        const int zero = step + (side == Side::key ? 2 * d : (d + 31) / 32 * kTile);
        x(t, i) = half(tile.scales[zero]) + half(tile.scales[step]) * code_at(tile.codes, info.bits, side, d, t, i);
        continue;
      }
      if (!info.trellis) x(t, i) = level(first, code_at(tile.codes, first.bits, side, d, t, i));
      x(t, i) *= half(tile.scales[i / per_scale * kTile + t]);
      if (code.center != Center::none) x(t, i) += half(*tile.mean_scale) * tile.mean[i];
    }
  if (info.projected) x += residuals(tile.codes + static_cast<int>(8 * d * first.bits), tile.scales + kTile, d, side);
  return info.rotated ? Matrix(x * rotation(d)) : x;
}

}  // namespace reference
