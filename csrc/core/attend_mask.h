// Masks of attend: which of the 64 scores at hand a query row may see, and with which additive bias.
#pragma once
#include <cstring>
#include <limits>

#include "kvpack/attend.h"
#include "simd/half.h"

namespace kvpack {

// A run of up to 64 keys whose scores lie side by side.
struct KeyRun {
  enum class Kind { stream, sinks, exact };
  int64_t start;  // stream index (stream, exact) or sink number of the first key
  int64_t tokens;
  Kind kind;
};

class MaskRows {
 public:
  MaskRows(const AttendParams& params, int64_t packed) : p_(params), packed_(packed) {}

  // Whether a mask or padding hides any of a row's keys.
  bool any(int64_t batch) const {
    return p_.mask.kind != Mask::Kind::none || (p_.rows != nullptr && p_.rows[2 * batch] != 0);
  }

  void apply(float* scores, int64_t batch, int64_t head, int64_t token, const KeyRun& run) const {
    const int64_t pad = p_.rows != nullptr ? p_.rows[2 * batch] : 0;
    const int64_t sink_start = p_.rows != nullptr ? p_.rows[2 * batch + 1] : 0;
    if (run.tokens < kTile) hide(scores, run.tokens, kTile);
    if (run.kind == KeyRun::Kind::exact && p_.causal) {
      // Query i of q sees exact tokens below E - q + i + 1; they are the last tokens of the stream.
      const int64_t visible = packed_ - run.start + p_.exact - p_.query_tokens + token + 1;
      if (visible < run.tokens) hide(scores, visible < 0 ? 0 : visible, run.tokens);
    }
    if (p_.mask.kind == Mask::Kind::none && pad == 0) return;
    const uint8_t* row = p_.mask.data + batch * p_.mask.batch + head * p_.mask.head + token * p_.mask.token;
    if (run.kind == KeyRun::Kind::sinks) return span(scores, row, sink_start + run.start, run.tokens, pad);
    // The stream lies around the sinks: at most two contiguous pieces.
    const int64_t before =
        sink_start > run.start ? (sink_start - run.start < run.tokens ? sink_start - run.start : run.tokens) : 0;
    span(scores, row, run.start, before, pad);
    span(scores + before, row, run.start + before + p_.sinks, run.tokens - before, pad);
  }

 private:
  static constexpr float kHidden = -std::numeric_limits<float>::infinity();

  static void hide(float* scores, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) scores[i] = kHidden;
  }

  // Scores of n consecutive positions from `position` on.
  void span(float* scores, const uint8_t* row, int64_t position, int64_t n, int64_t pad) const {
    if (n <= 0) return;
    if (position < pad) hide(scores, 0, pad - position < n ? pad - position : n);
    const uint8_t* at = row + position * p_.mask.key;
    if (p_.mask.kind == Mask::Kind::boolean) {
      for (int64_t i = 0; i < n; ++i)
        if (at[i * p_.mask.key] == 0) scores[i] = kHidden;
    } else if (p_.mask.kind == Mask::Kind::additive) {
      for (int64_t i = 0; i < n; ++i) {
        const float bias = element(at + i * p_.mask.key);
        scores[i] = bias == kHidden ? kHidden : scores[i] + bias * 1.44269504F;
      }
    }
  }

  float element(const uint8_t* at) const {
    if (p_.mask.dtype == Dtype::f32) {
      float v;
      std::memcpy(&v, at, 4);
      return v;
    }
    uint16_t bits;
    std::memcpy(&bits, at, 2);
    return p_.mask.dtype == Dtype::f16 ? half_to_float(bits) : bfloat_to_float(bits);
  }

  const AttendParams& p_;
  int64_t packed_;  // stream index of the first exact token
};

}  // namespace kvpack
