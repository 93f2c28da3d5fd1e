"""The four modes: what each sees, and that they agree where they must."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from kvpack import Policy, codecs, enable
from kvpack.eval import (
    CacheSpec,
    EmulationError,
    NothingPackedError,
    agreement,
    divergence,
    grid,
    perplexity,
    sweep,
)
from kvpack.eval.attach import emulating
from kvpack.eval.emulation import Emulator, Rule, packed_tokens, roundtrip, softmax_attention
from kvpack.eval.models import LoadedModel, cast_parameters, random_model
from kvpack.eval.modes import EXACT, Feed, Run, log_probs

MEANS = 8 * 66 * (1 / 64 + 1 / 256) / 64 / 2  # bits of centring, head size 64: a mean for each tile, and each page
CODECS = (*codecs(), "tq4/tq3", "tq4:center=none", "tq4:center=mean/tcq2:center=tile,search")


def all_rows(model: Any, ids: Tensor, spec: CacheSpec | None, mode: str, feed: Feed) -> tuple[Tensor, int]:
    run = Run(model, ids, spec, mode, feed)
    return torch.cat([log_probs(block) for block in run]), run.coded_queries


def test_packed_tokens_is_the_rule() -> None:
    for start in range(0, 400, 7):
        for window in (0, 1, 64, 130):
            for sinks in (0, 4):
                assert packed_tokens(start, window, sinks) == 64 * (max(0, start - sinks - window) // 64)


def test_feed_calls() -> None:
    assert Feed(0, 1, 0).calls(3) == [(0, 1), (1, 2), (2, 3)]
    assert Feed(5, 2, 5).calls(10) == [(0, 5), (5, 7), (7, 9), (9, 10)]
    assert Feed(0, 4, 0).calls(8) == [(0, 4), (4, 8)]


@pytest.mark.parametrize(("prompt", "chunk"), [(0, 1), (30, 1), (0, 9), (30, 9)])
def test_groups_cover_queries_once(prompt: int, chunk: int) -> None:
    rule = Rule(CacheSpec("tq4", window=10), prompt=prompt, chunk=chunk)
    seen = []
    for begin, end, coded in rule.groups(20, 300):
        assert begin < end
        seen += [(20 + q, coded) for q in range(begin, end)]
    calls = Feed(prompt, chunk, 0).calls(400)
    for position, coded in seen:
        start = next(begin for begin, end in calls if begin <= position < end)
        assert coded == packed_tokens(start, 10, 4)
    assert [position for position, _ in seen] == list(range(20, 320))


@pytest.mark.parametrize("masked", [False, True])
def test_attention_is_two_score_matrices_under_one_softmax(masked: bool) -> None:
    """Against the definition, query by query: scores and values coded where the rule says so, else exact."""
    torch.manual_seed(0)
    spec = CacheSpec("tq3", "tq2", window=7, sinks=3)
    query = torch.randn(1, 4, 90, 64, dtype=torch.float64)
    key, value = (torch.randn(1, 2, 200, 64, dtype=torch.float64) for _ in range(2))
    mask = torch.ones(200, 200, dtype=torch.bool).tril()[None, None, 110:] if masked else None
    out = Emulator(Rule(spec), (0,)).attend(0, query, key, value, mask, 0.1)
    assert out is not None
    coded = [x.clone() for x in (key, value)]
    centred = ("tq3:center=tile", "tq2:center=mean")  # as a cache does that keeps sinks
    for x, codec, side in zip(coded, centred, ("key", "value"), strict=True):
        x[:, :, 3:195] = roundtrip(x[:, :, 3:195], codec, side).double()
    for i in (0, 40, 89):
        n = 110 + i
        edge = 3 + packed_tokens(n, 7, 3)
        for head in range(4):
            near, far = key[0, head // 2], coded[0][0, head // 2]
            from_codes = torch.arange(200) < edge
            from_codes[:3] = False
            scores = torch.where(from_codes, far @ query[0, head, i], near @ query[0, head, i]) * 0.1
            scores[n + 1 :] = float("-inf")
            p = scores.softmax(-1)
            want = (p * from_codes) @ coded[1][0, head // 2] + (p * ~from_codes) @ value[0, head // 2]
            assert torch.allclose(out[0, head, i], want, atol=1e-12)


def test_softmax_attention_options() -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(1, 4, 5, 8), torch.randn(1, 2, 9, 8), torch.randn(1, 2, 9, 8)
    mask = torch.rand(1, 1, 5, 9) > 0.2
    sdpa = torch.nn.functional.scaled_dot_product_attention
    plain = sdpa(q, k, v, attn_mask=mask, scale=0.3, enable_gqa=True)
    assert torch.allclose(softmax_attention(q, k, v, mask, 0.3), plain, atol=1e-6)
    added = torch.zeros(mask.shape).masked_fill(~mask, float("-inf"))
    assert torch.allclose(softmax_attention(q, k, v, added, 0.3), plain, atol=1e-6)
    big = softmax_attention(q, k, v, mask, 0.3, sink_logits=torch.full((4,), 50.0))
    assert big.abs().max() < 1e-6  # all the weight goes to the sink logit
    capped = softmax_attention(q, k, v, mask, 0.3, softcap=1e-4)
    uniform = (mask / mask.sum(-1, keepdim=True)) @ v.repeat_interleave(2, 1)
    assert torch.allclose(capped, uniform, atol=1e-3)


@pytest.mark.parametrize(
    "codec", ["tq3/tq4", "q4_0", "tq2:center=none", "tq3:center=mean/tq2:center=tile", "tcq3/tcq2:search", "rq4_0/tqr3"]
)
def test_stepwise_chunked_and_emulated_agree_in_float64(tiny64: LoadedModel, ids: Tensor, codec: str) -> None:
    spec = CacheSpec.parse(codec, window=20, sinks=4, fused=False)
    model = tiny64.model
    rows = {mode: all_rows(model, ids[0], spec, mode, Feed(0, 1, 40)) for mode in ("stepwise", "chunked", "emulated")}
    a, read = rows["stepwise"]
    for mode in ("chunked", "emulated"):
        assert (rows[mode][0] - a).abs().max() < 1e-6
        assert rows[mode][1] == read == 259 - (4 + 20 + 64)
    exact, _ = all_rows(model, ids[0], None, EXACT, Feed(0, 1, 40))
    assert (exact - a).abs().max() > 1e-3  # the codec did something


@pytest.mark.parametrize("exact_layer", [None, 0, 1])
def test_policies_agree_in_float64(tiny64: LoadedModel, ids: Tensor, exact_layer: int | None) -> None:
    """Codecs by layer, also where one layer is exact and the emulation leaves it to the stock attention."""
    layers = {1: ("tq2", "q4_0")} if exact_layer is None else {exact_layer: ("exact", "exact")}
    policy = Policy("tq3", "tq4", layers, window=20)
    # The packed path has no float64 `exact`: the cache keeps that layer in q8_0, and emulation is told so too.
    real = policy if exact_layer is None else Policy("tq3", "tq4", {exact_layer: ("q8_0", "q8_0")}, window=20)
    stepwise, read = all_rows(tiny64.model, ids[0], CacheSpec(policy=real, fused=False), "stepwise", Feed(0, 1, 40))
    emulated, same = all_rows(tiny64.model, ids[0], CacheSpec(policy=real), "emulated", Feed(0, 1, 40))
    assert (stepwise - emulated).abs().max() < 1e-6
    assert read == same == 259 - (4 + 20 + 64)
    partly, same = all_rows(tiny64.model, ids[0], CacheSpec(policy=policy), "emulated", Feed(0, 1, 40))
    assert read == same
    uniform, _ = all_rows(tiny64.model, ids[0], CacheSpec("tq3", "tq4", window=20), "emulated", Feed(0, 1, 40))
    assert (partly - uniform).abs().max() > 1e-4
    if exact_layer is not None:  # q8_0 is nearly exact, so leaving a layer exact comes close to it
        assert (partly - emulated).abs().mean() < 0.2 * (partly - uniform).abs().mean()


def test_everything_that_takes_codecs_takes_policies(tiny: LoadedModel, ids: Tensor, tmp_path: Path) -> None:
    policy = Policy("tq4", "tq3", {1: ("tq2", "tq2")}, window=20)
    policy.save(tmp_path / "p.json")
    said: list[Any] = [policy, str(tmp_path / "p.json"), {"policy": policy}, CacheSpec(policy=policy)]
    assert {CacheSpec.of(cache) for cache in said} == {CacheSpec(policy=policy)}
    results = [divergence(tiny, ids, policy, mode) for mode in ("fake", "emulated", "chunked")]
    assert {(r.label, r.policy, r.sinks) for r in results} == {("tq4/tq3 +1 layer",) * 2 + (4,)}
    assert [r.window for r in results] == [0, 20, 20]
    assert results[1].cache_bytes is not None
    assert agreement(tiny, ids[0], policy, "emulated", "chunked", chunk=8).share < 0.1
    rows = sweep(tiny, ids, [policy, "tq4"], path=tmp_path / "rows.jsonl", skip=220)
    assert sweep(tiny, ids, [policy, "tq4"], path=tmp_path / "rows.jsonl", skip=220) == rows
    assert [spec.label for spec in grid(["small", "tq4:scale=mse"], [0, 1])] == ["small", *["tq4:scale=mse"] * 2]
    assert CacheSpec(policy=policy).bits(64, layers=2) == (4.25 + 3.25 + 2.25 + 2.25) / 4 + MEANS
    with pytest.raises(ValueError, match="say which"):
        CacheSpec(policy=policy).bits(64)


def test_a_policy_and_what_it_decides(tiny: LoadedModel, ids: Tensor) -> None:
    with pytest.raises(ValueError, match="key='tq4' and policy='small' exclude each other"):
        CacheSpec.of({"key": "tq4", "policy": "small"})
    with pytest.raises(ValueError, match="window=20 and policy 'small' exclude each other"):
        CacheSpec.parse("small", window=20)
    for mode in ("fake", "emulated", "chunked"):
        with pytest.raises(ValueError, match="names layer 2, but the model has 2"):
            divergence(tiny, ids, Policy("tq4", layers={2: ("tq3", "tq3")}, window=20), mode)


@pytest.mark.parametrize(("prompt", "chunk"), [(0, 33), (100, 1), (70, 10)])
def test_emulated_follows_prompt_and_chunks(tiny64: LoadedModel, ids: Tensor, prompt: int, chunk: int) -> None:
    spec = CacheSpec("tq3", window=10, fused=False)
    feed = Feed(prompt, chunk, max(prompt, 40))
    real, read = all_rows(tiny64.model, ids[0], spec, "chunked", feed)
    one_pass, emulated_read = all_rows(tiny64.model, ids[0], spec, "emulated", feed)
    assert (real - one_pass).abs().max() < 1e-6
    assert read == emulated_read


@pytest.mark.parametrize("codec", CODECS)
def test_the_fused_cache_agrees_with_emulation(tiny: LoadedModel, ids: Tensor, codec: str) -> None:
    """Through the real kernels, in float32: what they add is small beside what the codec does."""
    spec = CacheSpec.parse(codec, window=20, precision="high")
    found = agreement(tiny, ids[0], spec, "emulated", "chunked", chunk=8, skip=60)
    assert found.between < 1e-6 + 0.02 * found.codec
    dense = agreement(tiny, ids[0], CacheSpec.parse(codec, window=20, fused=False), "emulated", "chunked", chunk=8)
    assert dense.between < 1e-7 + 0.01 * dense.codec


def test_fake_codes_every_token(tiny: LoadedModel, ids: Tensor) -> None:
    fake = divergence(tiny, ids, dict(key="tq3", window=20), "fake")
    emulated = divergence(tiny, ids, dict(key="tq3", window=20))
    assert fake.window == 0
    assert fake.coded_queries == 2 * 259
    assert fake.kld.value > 1.2 * emulated.kld.value > 0
    harsher = divergence(tiny, ids, dict(key="tq3", sinks=0), "fake")
    assert harsher.kld.value != fake.kld.value


def test_reduced_precision_model_runs_in_every_mode(ids: Tensor) -> None:
    model = random_model("bfloat16", layers=2)
    for mode in ("fake", "emulated", "chunked"):
        result = divergence(model, ids[:1], dict(key="tq4", window=20), mode)
        assert result.dtype == "bfloat16"
        assert 0 < result.kld.value < 2


def test_nothing_packed_is_an_error_not_a_result(tiny: LoadedModel, ids: Tensor) -> None:
    for mode in ("emulated", "chunked", "stepwise"):
        with pytest.raises(NothingPackedError, match="first tile of 64 tokens is packed at 368"):
            divergence(tiny, ids, dict(key="tq4", window=300), mode)
        with pytest.raises(NothingPackedError):
            perplexity(tiny, ids, dict(key="tq4", window=300), mode)
    with pytest.raises(NothingPackedError, match="last call starts at position 0"):
        perplexity(tiny, ids, dict(key="tq4", window=10), "chunked", chunk=500)


def test_a_cache_that_packs_nothing_is_found_out(tiny: LoadedModel, ids: Tensor) -> None:
    """The rule says that tokens were packed; the cache under test never did."""

    def factory(config: Any) -> Any:
        return CacheSpec("tq4", window=500).build(config)

    spec = CacheSpec("tq4", window=20, factory=factory)
    with pytest.raises(NothingPackedError, match="no query attended"):
        divergence(tiny, ids[0], spec, "chunked", chunk=16)


def test_a_model_without_full_attention_is_refused(ids: Tensor) -> None:
    config = transformers.MistralConfig(
        vocab_size=256, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=1,
        num_key_value_heads=1, head_dim=64, sliding_window=32,
    )  # fmt: skip
    model = transformers.MistralForCausalLM(config).eval()
    with pytest.raises(NothingPackedError, match="no full-attention layer"):
        divergence(model, ids[0], dict(key="tq4", window=20))


def test_the_model_is_left_as_it_was(tiny: LoadedModel, ids: Tensor) -> None:
    model = tiny.model
    before = model(ids[:1]).logits
    divergence(tiny, ids[:1], dict(key="tq2", window=20))
    assert model.config._attn_implementation == "sdpa"
    assert torch.equal(model(ids[:1]).logits, before)
    with (
        pytest.raises(RuntimeError, match="stop"),
        emulating(model, Emulator(Rule(CacheSpec("tq2")), (0, 1))),
    ):
        raise RuntimeError("stop")
    assert model.config._attn_implementation == "sdpa"


def test_attention_that_cannot_be_replaced_is_refused(tiny: LoadedModel, ids: Tensor) -> None:
    model = random_model(layers=1).model
    model.config._attn_implementation_internal = "flex_attention"
    with pytest.raises(EmulationError, match="flex_attention"):
        divergence(model, ids[0], dict(key="tq4", window=20))


def _family(name: str) -> Any:
    torch.manual_seed(0)
    small = dict(
        vocab_size=256, hidden_size=128, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=64, max_position_embeddings=512, pad_token_id=0, bos_token_id=1,
        eos_token_id=2,
    )  # fmt: skip
    t = transformers
    made = {
        "gemma2": lambda: (t.Gemma2ForCausalLM, t.Gemma2Config(**small, sliding_window=64), "eager"),
        "gemma3": lambda: (
            t.Gemma3ForCausalLM,
            t.Gemma3TextConfig(**{**small, "num_hidden_layers": 6}, sliding_window=64),
            "sdpa",
        ),
        "falcon": lambda: (
            t.FalconForCausalLM,
            t.FalconConfig(vocab_size=256, hidden_size=256, num_hidden_layers=2, num_attention_heads=4,
                           multi_query=True, new_decoder_architecture=False, alibi=False, bos_token_id=1,
                           eos_token_id=2),
            "sdpa",
        ),
        "qwen3": lambda: (t.Qwen3ForCausalLM, t.Qwen3Config(**small), "sdpa"),
    }  # fmt: skip
    kind, config, attention = made[name]()
    config._attn_implementation = attention
    model = kind(config).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(std=2 * parameter.shape[-1] ** -0.5)
    cast_parameters(model, torch.float64)
    return model


@pytest.mark.filterwarnings("ignore:kvpack. not packed")
@pytest.mark.parametrize("name", ["gemma2", "gemma2 enabled", "gemma3", "falcon", "qwen3"])
def test_families(name: str, ids: Tensor) -> None:
    """Softcap, eager and under `kvpack.enable`; hybrid layers, a model that calls sdpa itself, query norms."""
    model = _family(name.removesuffix(" enabled"))
    if name.endswith("enabled"):
        enable(model)
    found = agreement(model, ids[0, :160], dict(key="tq3", value="tq2", window=10, fused=False))
    assert found.codec > 1e-6
    assert found.largest < 1e-4
    assert found.between < 1e-6 * found.codec + 1e-12
