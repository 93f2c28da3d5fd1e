// Trains the levels of the trellis codecs on N(0, 1) and writes them to csrc/codecs/trellis_tables.h and
// python/kvpack/reference/trellis_tables.py. Seeded; some minutes on one core with AVX-512:
//
//   g++ -O3 -std=c++20 -ffp-contract=off -Icsrc tools/train_trellis.cpp -o train && ./train
//
// Lloyd's iteration with the encoder's own search: encode Gaussian sequences, set each level to the mean of what was
// coded with it. Several random starts; the best one is refined on more sequences, rounded to int8 (the unit is tried
// over a range), and refined again as integers.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <random>
#include <string>
#include <vector>

#if defined(__AVX512BW__) && defined(__AVX512VNNI__)
#include "simd/avx512_vnni.h"
using Policy = Avx512Vnni;
#elif defined(__AVX2__)
#include "simd/avx2.h"
using Policy = Avx2;
#elif defined(__ARM_NEON)
#include "simd/neon.h"
using Policy = Neon;
#else
#include "simd/scalar.h"
using Policy = Scalar;
#endif
#include "kernels/viterbi.inl.h"

namespace {

using namespace kvpack;
constexpr int kLanes = kTrellisLanes;
constexpr double kFixed = kTrellisFixed;

// Box and Muller's normal deviates: the standard leaves std::normal_distribution to the library.
class Gaussian {
 public:
  explicit Gaussian(uint64_t seed) : bits_(seed) {}
  void fill(std::vector<float>& z) {
    for (size_t i = 0; i + 1 < z.size(); i += 2) {
      const double radius = std::sqrt(-2 * std::log(uniform())), angle = 2 * M_PI * uniform();
      z[i] = static_cast<float>(radius * std::cos(angle));
      z[i + 1] = static_cast<float>(radius * std::sin(angle));
    }
  }
  void shuffle(std::vector<double>& v) {
    for (size_t i = v.size() - 1; i > 0; --i) std::swap(v[i], v[bits_() % (i + 1)]);
  }
  bool coin() { return (bits_() & 1) != 0; }

 private:
  double uniform() { return (static_cast<double>(bits_() >> 11) + 0.5) * 0x1p-53; }
  std::mt19937_64 bits_;
};

using Levels = std::vector<double>;  // 256: of even and of odd steps

struct Result {
  double error = 0;  // per value; with the best scale of each sequence where `sphere` is asked for
  Levels sum = Levels(256, 0.0), count = Levels(256, 0.0);
};

// Searches `sequences` Gaussian sequences. sphere: of equal norm, and decoded with the scale rule `mse`.
template <class Code>
Result measure(const Levels& levels, int steps, int sequences, uint64_t seed, bool sphere) {
  static TrellisWork work;
  TrellisValues values;
  for (int i = 0; i < 256; ++i)
    values.value[i / 128][i % 128] = trellis_pair(static_cast<int32_t>(std::lrint(levels[i] * kFixed)));
  Gaussian gaussian(seed);
  std::vector<float> z(static_cast<size_t>(steps * kLanes));
  std::vector<int16_t> x(z.size());
  std::vector<uint8_t> codes(z.size());
  Result result;
  for (int done = 0; done < sequences; done += kLanes) {
    gaussian.fill(z);
    for (int l = 0; l < kLanes && sphere; ++l) {
      double energy = 0;
      for (int i = 0; i < steps; ++i) energy += z[i * kLanes + l] * z[i * kLanes + l];
      for (int i = 0; i < steps; ++i) z[i * kLanes + l] *= static_cast<float>(std::sqrt(steps / energy));
    }
    for (size_t i = 0; i < z.size(); ++i)
      x[i] = static_cast<int16_t>(std::clamp(std::nearbyint(z[i] * kTrellisFixed), -32768.0F, 32767.0F));
    constexpr int kTogether = Policy::W16::kLanes;
    for (int l = 0; l < kLanes; l += kTogether)
      TrellisSearch<Policy, Code>::run(values, x.data() + l, steps, kLanes, kTogether, codes.data() + l, work);
    for (int l = 0; l < kLanes; ++l) {
      int window = 0;
      double error = 0, xc = 0, cc = 0, xx = 0;
      for (int i = -10; i < steps; ++i) {
        const int bits = i % 2 == 0 ? Code::kEvenBits : Code::kOddBits;
        window = window >> bits | codes[(i + steps) % steps * kLanes + l] << (9 - bits);
        if (i < 0) continue;
        const int at = i % 2 * 128 + (window >> 1 & 127);
        const double sign = ((window >> 8 ^ window) & 1) != 0 ? -1 : 1, v = sign * levels[at];
        const double target = z[i * kLanes + l];
        error += (target - v) * (target - v);
        xc += target * v, cc += v * v, xx += target * target;
        result.sum[at] += sign * target;
        result.count[at] += 1;
      }
      result.error += sphere ? xx - xc * xc / cc : error;
    }
  }
  result.error /= static_cast<double>(sequences) * steps;
  return result;
}

// One iteration of Lloyd's. unit: levels are its integer multiples, within int8 (0: any).
template <class Code>
Levels improve(const Levels& levels, int sequences, uint64_t seed, double unit) {
  Result r = measure<Code>(levels, 128, sequences, seed, false);
  if (Code::kEvenBits == Code::kOddBits)
    for (int i = 0; i < 128; ++i) {
      r.sum[i] = r.sum[i + 128] = r.sum[i] + r.sum[i + 128];
      r.count[i] = r.count[i + 128] = r.count[i] + r.count[i + 128];
    }
  Levels next = levels;
  for (int i = 0; i < 256; ++i) {
    if (r.count[i] > 4) next[i] = std::clamp(r.sum[i] / r.count[i], -3.9, 3.9);
    if (unit != 0) next[i] = std::clamp(std::nearbyint(next[i] / unit), -127.0, 127.0) * unit;
  }
  return next;
}

template <class Code>
double test_error(const Levels& levels, int sequences) {
  return measure<Code>(levels, 64, 2 * sequences, 1, true).error + measure<Code>(levels, 128, sequences, 2, true).error;
}

// Quantiles of the normal distribution in random order, with random signs.
Levels random_start(uint64_t seed, bool one_table) {
  Gaussian gaussian(seed);
  Levels levels;
  for (int phase = 0; phase < 2; ++phase) {
    std::vector<double> half;
    for (int i = 0; i < 128; ++i) {
      double low = 0, high = 8;
      for (int n = 0; n < 60; ++n) {
        const double middle = (low + high) / 2;
        (std::erf(middle / std::sqrt(2.0)) < (i + 0.5) / 128 ? low : high) = middle;
      }
      half.push_back(low);
    }
    gaussian.shuffle(half);
    for (double& v : half) v = gaussian.coin() ? -v : v;
    levels.insert(levels.end(), half.begin(), half.end());
  }
  if (one_table) std::copy_n(levels.begin(), 128, levels.begin() + 128);
  return levels;
}

struct Trained {
  std::string name, note;
  int phases, unit;
  std::vector<int> level;
};

// Training: the code with the search that it is trained with; the error that is told is that of Code's own.
template <class Code, class Training = Code>
Trained train(const std::string& name) {
  constexpr int kStarts = 12, kFirst = 60, kSecond = 120, kRounded = 30, kTest = 12800;
  const bool one_table = Code::kEvenBits == Code::kOddBits;
  Levels best;
  double least = 1e9;
  for (int start = 1; start <= kStarts; ++start) {
    Levels levels = random_start(static_cast<uint64_t>(start), one_table);
    for (int i = 0; i < kFirst; ++i)
      levels = improve<Training>(levels, 1600, static_cast<uint64_t>(1000 * start + i), 0);
    const double error = test_error<Training>(levels, kTest);
    std::fprintf(stderr, "%s start %d: %.6f\n", name.c_str(), start, error / 2);
    if (error < least) least = error, best = levels;
  }
  for (int i = 0; i < kSecond; ++i) best = improve<Training>(best, 6400, static_cast<uint64_t>(100000 + i), 0);
  const double real64 = measure<Code>(best, 64, 2 * kTest, 3, true).error;
  const double real128 = measure<Code>(best, 128, kTest, 4, true).error;

  double largest = 0;
  for (const double v : best) largest = std::max(largest, std::fabs(v));
  const int top = static_cast<int>(std::ceil(largest * kFixed / 127));
  Levels rounded;
  int unit = 0;
  least = 1e9;
  for (int u = top; u > top * 85 / 100; u -= 2) {
    Levels levels = improve<Training>(best, 6400, 200000, u / kFixed);
    for (int i = 1; i < kRounded; ++i) {
      const double error = test_error<Training>(levels, kTest / 4);
      if (error < least) least = error, rounded = levels, unit = u;
      levels = improve<Training>(levels, 6400, static_cast<uint64_t>(200000 + i), u / kFixed);
    }
  }
  char note[160];
  std::snprintf(note, sizeof note, "64 steps %.5f, 128 steps %.5f (real levels: %.5f, %.5f)",
                measure<Code>(rounded, 64, 2 * kTest, 3, true).error, measure<Code>(rounded, 128, kTest, 4, true).error,
                real64, real128);
  std::printf("%s: %s\n", name.c_str(), note);
  Trained t{name, note, one_table ? 1 : 2, unit, {}};
  for (int i = 0; i < 128 * t.phases; ++i)
    t.level.push_back(static_cast<int>(std::lrint(rounded[static_cast<size_t>(i)] * kFixed / unit)));
  return t;
}

// tcq1 was trained before its seam grew from 40 steps to 64.
struct Tcq1Training : TrellisCode<1, 1, 0, 40> {};

// The levels of a phase, 16 to a line.
std::string rows(const Trained& t, int phase, const std::string& indent) {
  std::string out;
  for (int i = 0; i < 128; ++i) {
    out += i % 16 == 0 ? indent : " ";
    out += std::to_string(t.level[static_cast<size_t>(phase * 128 + i)]) + (i % 16 == 15 ? ",\n" : ",");
  }
  return out;
}

std::string identifier(std::string name) {  // tcq2.5 -> Tcq25
  name.erase(std::remove(name.begin(), name.end(), '.'), name.end());
  name[0] = 'T';
  return name;
}

void write(const char* path, const std::string& text) {
  std::FILE* file = std::fopen(path, "w");
  if (file == nullptr || std::fputs(text.c_str(), file) < 0 || std::fclose(file) != 0) {
    std::perror(path);
    std::exit(1);
  }
}

}  // namespace

int main() {
  const std::vector<Trained> all = {train<Tcq1Code, Tcq1Training>("tcq1"),
                                    train<Tcq2Code>("tcq2"),
                                    train<Tcq25Code>("tcq2.5"),
                                    train<Tcq3Code>("tcq3"),
                                    train<Tcq35Code>("tcq3.5"),
                                    train<Tcq4Code>("tcq4")};
  std::string cpp =
      "// Levels of the trellis codecs, written by tools/train_trellis.cpp (the command is at its head). They are "
      "part\n"
      "// of the format. Squared error per value of Gaussian sequences of unit variance, best scale per "
      "sequence:\n//\n";
  std::string python =
      "\"\"\"Levels of the trellis codecs, written by tools/train_trellis.cpp; csrc/codecs/trellis_tables.h has the "
      "same.\n"
      "\n    bits per value: (unit, tables of 128 levels: of all steps, or of even and of odd ones)\n\"\"\"\n\n"
      "# fmt: off\nTRELLIS_TABLES: dict[float, tuple[int, tuple[tuple[int, ...], ...]]] = {\n";
  std::string tables;
  for (const Trained& t : all) {
    cpp += "//   " + t.name + "  " + t.note + "\n";
    tables += "constexpr TrellisLevels k" + identifier(t.name) + "Levels{" + std::to_string(t.unit) + ", {\n";
    python += "    " + t.name.substr(3) + ": (" + std::to_string(t.unit) + ", (\n";
    for (int p = 0; p < t.phases; ++p) {
      tables += "    {\n" + rows(t, p, "        ") + "    },\n";
      python += "        (\n" + rows(t, p, "            ") + "        ),\n";
    }
    tables += "}};\n";
    python += "    )),\n";
  }
  write("csrc/codecs/trellis_tables.h", cpp +
                                            "#pragma once\n#include \"codecs/trellis.h\"\n\n// clang-format off\n"
                                            "namespace kvpack {\n\n" +
                                            tables + "\n}  // namespace kvpack\n");
  write("python/kvpack/reference/trellis_tables.py", python + "}\n# fmt: on\n");
}
