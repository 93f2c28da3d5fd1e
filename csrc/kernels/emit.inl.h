// Fills a KernelTable from a policy: every kernel, for every line of codecs.def.
#pragma once
#include "kernels/accumulate.inl.h"
#include "kernels/decode.inl.h"
#include "kernels/dense.inl.h"
#include "kernels/encode.inl.h"
#include "kernels/mean.inl.h"
#include "kernels/score.inl.h"
#include "kernels/softmax.inl.h"
#include "kernels/viterbi.inl.h"

namespace {

template <class S, class Codec>
constexpr void emit_codec(kvpack::KernelTable& t, int id) {
  if constexpr (Codec::kBits != 0) {
    using Read = typename kvpack::ReadAs<Codec>::type;
    t.score[id][0] = score<S, Read, 1>;
    t.score[id][1] = score<S, Read, 2>;
    t.score[id][2] = score<S, Read, 3>;
    t.score[id][3] = score<S, Read, 4>;
    t.accumulate[id][0] = accumulate<S, Read, 1>;
    t.accumulate[id][1] = accumulate<S, Read, 2>;
    t.accumulate[id][2] = accumulate<S, Read, 3>;
    t.accumulate[id][3] = accumulate<S, Read, 4>;
    t.encode[id] = encode<S, Codec>;
    t.decode[id] = decode<S, Codec>;
  }
}

template <class S, kvpack::Dtype T>
constexpr void emit_dtype(kvpack::KernelTable& t) {
  constexpr int i = static_cast<int>(T);
  t.exact_score[i][0] = exact_score<S, T, 1>;
  t.exact_score[i][1] = exact_score<S, T, 2>;
  t.exact_score[i][2] = exact_score<S, T, 3>;
  t.exact_score[i][3] = exact_score<S, T, 4>;
  t.dense_score[i] = dense_score<S, T>;
  t.dense_accumulate[i] = dense_accumulate<S, T>;
}

template <class S>
constexpr kvpack::KernelTable emit(const char* name) {
  using namespace kvpack;
  KernelTable t{};
  t.name = name;
  t.rotate = rotate<S>;
  t.quantize_query = quantize_query<S>;
  t.softmax = softmax<S>;
  t.softcap = softcap<S>;
  t.score_mean = score_mean<S>;
  t.accumulate_mean = accumulate_mean<S>;
  t.encode_mean = encode_mean<S>;
  emit_dtype<S, Dtype::f32>(t);
  emit_dtype<S, Dtype::f16>(t);
  emit_dtype<S, Dtype::bf16>(t);
  t.trellis_search[0] = trellis_search<S, Tcq1Code>;
  t.trellis_search[1] = trellis_search<S, Tcq2Code>;
  t.trellis_search[2] = trellis_search<S, Tcq25Code>;
  t.trellis_search[3] = trellis_search<S, Tcq3Code>;
  t.trellis_search[4] = trellis_search<S, Tcq35Code>;
  t.trellis_search[5] = trellis_search<S, Tcq4Code>;
#define KVPACK_CODEC(id, name, Traits, what, source) emit_codec<S, Traits>(t, id);
#include "codecs/codecs.def"
#undef KVPACK_CODEC
  return t;
}

}  // namespace
