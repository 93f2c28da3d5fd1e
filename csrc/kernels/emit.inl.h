// Fills a KernelTable, or the Readers of one, from a policy: every kernel, for every line of codecs.def.
#pragma once
#include "kernels/accumulate.inl.h"
#include "kernels/decode.inl.h"
#include "kernels/dense.inl.h"
#include "kernels/e4m3.inl.h"
#include "kernels/encode.inl.h"
#include "kernels/expand.inl.h"
#include "kernels/gather.inl.h"
#include "kernels/mean.inl.h"
#include "kernels/project.inl.h"
#include "kernels/score.inl.h"
#include "kernels/softmax.inl.h"
#include "kernels/viterbi.inl.h"

namespace {

// G query rows, one after the other.
template <auto kernel, int G>
void score_in_turn(const kvpack::ScoreArgs& a) {
  for (int g = 0; g < G; ++g) {
    kvpack::ScoreArgs one = a;
    one.rows = a.rows + g;
    one.query = a.query + g * a.head_dim;
    one.scores = a.scores + g * kvpack::kTile;
    kernel(one);
  }
}
template <auto kernel, int G>
void accumulate_in_turn(const kvpack::AccumulateArgs& a) {
  for (int g = 0; g < G; ++g) {
    kvpack::AccumulateArgs one = a;
    one.probs = a.probs + g * kvpack::kTile;
    one.out = a.out + g * a.out_stride;
    kernel(one);
  }
}

template <class S, class Codec>
constexpr bool kExpands = S::kExpandsFrom != 0 &&
                          (Codec::kTrellis) && kvpack::unit_dwords(Codec::kBits) >= S::kExpandsFrom;

template <class S, class Codec, int G>
constexpr auto score_of() {
  if constexpr (Codec::kElements)
    return score_e4m3<S, G>;
  else if constexpr (kExpands<S, Codec>)
    return score_expanded<S, Codec, G>;
  else
    return score<S, typename kvpack::ReadAs<Codec>::type, G>;
}
template <class S, class Codec, int G>
constexpr auto accumulate_of() {
  if constexpr (Codec::kElements)
    return accumulate_e4m3<S, G>;
  else if constexpr (kExpands<S, Codec>)
    return accumulate_expanded<S, Codec, G>;
  else
    return accumulate<S, typename kvpack::ReadAs<Codec>::type, G>;
}

template <class S, class Codec, int G>
constexpr void emit_group(kvpack::Readers& t, int id) {
  if constexpr (G <= S::kGroup) {
    t.score[id][G - 1] = score_of<S, Codec, G>();
    t.accumulate[id][G - 1] = accumulate_of<S, Codec, G>();
  } else {
    t.score[id][G - 1] = score_in_turn<score_of<S, Codec, 1>(), G>;
    t.accumulate[id][G - 1] = accumulate_in_turn<accumulate_of<S, Codec, 1>(), G>;
  }
}

template <class S>
constexpr kvpack::Readers emit_readers() {
  using namespace kvpack;
  Readers t{};
  t.fixed_point = InterleavesRows<S>;
  t.quantize_query = quantize_query<S>;
  const auto emit_codec = [&]<class Codec>(int id) {
    if constexpr (Codec::kBits != 0 && !TwoParts<Codec>) {  // parts are read by the codecs that they are
      emit_group<S, Codec, 1>(t, id);
      emit_group<S, Codec, 2>(t, id);
      emit_group<S, Codec, 3>(t, id);
      emit_group<S, Codec, 4>(t, id);
    }
  };
#define KVPACK_CODEC(id, name, Traits, what, source) emit_codec.template operator()<Traits>(id);
#include "codecs/codecs.def"
#undef KVPACK_CODEC
  return t;
}

template <class S, class Codec>
constexpr void emit_codec(kvpack::KernelTable& t, int id) {
  if constexpr (Codec::kBits != 0 && !Codec::kSplit) {  // the parts of split codecs are encoded apart
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
  static_cast<Readers&>(t) = emit_readers<S>();
  t.name = name;
  t.rotate = rotate<S>;
  t.project = project<S>;
  t.project_back = project_back<S>;
  t.softmax = softmax<S>;
  t.softcap = softcap<S>;
  t.score_mean = score_mean<S>;
  t.accumulate_mean = accumulate_mean<S>;
  t.encode_mean = encode_mean<S>;
  t.gather = gather<S>;
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
