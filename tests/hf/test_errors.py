"""Bad input: each a clear error that names the value and what is allowed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import DynamicCache, LlamaConfig

import kvpack
from kvpack.hf import PackedLayer

from . import helpers as h
from .test_window import make


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"key": "tq5"}, "unknown codec 'tq5'.*did you mean 'tq"),
        ({"value": "q80"}, "unknown codec 'q80'.*did you mean 'q8_0'"),
        ({"key": "tq4:scale=best"}, "unknown scale rule 'best'"),
        ({"key": "tq4:centre=tile"}, "unknown option 'centre'.*did you mean 'center'"),
        ({"key": "q8_0:center=tile"}, "q8_0 has no centring"),
        ({"window": -1}, "window=-1 is not allowed: a whole number of tokens, 0 or more"),
        ({"window": 1.5}, r"window=1.5 is not allowed"),
        ({"sinks": -4}, "sinks=-4 is not allowed"),
        ({"sinks": True}, "sinks=True is not allowed"),
        ({"precision": "best"}, "precision='best' is not allowed: 'default' or 'high'"),
        ({"sparse_values": 1.0}, "sparse_values=1.0 is not allowed: a share, 0 to below 1"),
        ({"sparse_values": True}, "sparse_values=True is not allowed: a share, 0 to below 1"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kvpack.Cache(h.llama().config, **options)


def test_not_a_config() -> None:
    with pytest.raises(TypeError, match="config is a LlamaForCausalLM; allowed: a transformers config"):
        kvpack.Cache(h.llama())


@pytest.mark.parametrize("head_dim", [32, 72, 88, 512])
def test_head_size_of_the_config(head_dim: int) -> None:
    config = LlamaConfig(**{**h.SHAPE, "head_dim": head_dim})
    with pytest.raises(ValueError, match=rf"layer 0 cannot be packed with key codec tq4.*{head_dim}.*64, 80, .* 256"):
        kvpack.Cache(config)


def test_head_size_of_the_keys() -> None:
    layer = make(64, 4, "tq4", index=3)
    new = torch.randn(1, 2, 5, 88)
    with pytest.raises(ValueError, match=r"layer 3 cannot be packed.*88.*64, 80, .* 256"):
        layer.update(new, new)
    good = torch.randn(1, 2, 5, 64)
    layer.update(good, good)  # nothing was kept of the bad call


def shaped(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype)


@pytest.mark.parametrize(
    ("keys", "values", "message"),
    [
        (shaped(0, 2, 5, 64), shaped(0, 2, 5, 64), r"keys of shape \[0, 2, 5, 64\] are empty"),
        (shaped(2, 5, 64), shaped(2, 5, 64), "keys have 3 dims; allowed: 4"),
        (shaped(1, 2, 5, 64), shaped(1, 2, 6, 64), "differ in more than their head size"),
        (shaped(1, 2, 5, 64), shaped(1, 4, 5, 64), "differ in more than their head size"),
        (shaped(1, 2, 5, 64), shaped(1, 2, 5, 64, dtype=torch.float16), "differ in more than their head size"),
        (shaped(1, 2, 5, 64, dtype=torch.int32), shaped(1, 2, 5, 64, dtype=torch.int32), "torch.int32; allowed"),
        (shaped(1, 2, 5, 64).to("meta"), shaped(1, 2, 5, 64).to("meta"), "on meta; allowed: the CPU"),
    ],
)
def test_first_keys_and_values(keys: torch.Tensor, values: torch.Tensor, message: str) -> None:
    layer = make(64, 4, "tq4", index=7)
    with pytest.raises(ValueError, match="layer 7: .*" + message):
        layer.update(keys, values)
    assert not layer.is_initialized


@pytest.mark.parametrize(
    ("keys", "values", "message"),
    [
        (shaped(2, 2, 1, 64), shaped(2, 2, 1, 64), "do not continue this cache, which holds 1 rows, 2 KV heads"),
        (shaped(1, 4, 1, 64), shaped(1, 4, 1, 64), "do not continue this cache, which holds 1 rows, 2 KV heads"),
        (shaped(1, 2, 1, 128), shaped(1, 2, 1, 64), "do not continue.* head sizes 64 .key. and 128"),
        (shaped(1, 2, 1, 64), shaped(1, 2, 1, 128, dtype=torch.bfloat16), "differ in more than their head"),
        (
            shaped(1, 2, 1, 64, dtype=torch.bfloat16),
            shaped(1, 2, 1, 128, dtype=torch.bfloat16),
            "torch.bfloat16 do not continue this cache.*torch.float32",
        ),
        (shaped(1, 2, 2, 64), shaped(1, 2, 1, 128), "differ in more than their head size"),
        (shaped(2, 1, 64), shaped(1, 2, 1, 128), "differ in more than their head size"),
    ],
)
def test_later_keys_and_values(keys: torch.Tensor, values: torch.Tensor, message: str) -> None:
    layer = make(64, 4, "tq4")
    layer.update(torch.randn(1, 2, 5, 64), torch.randn(1, 2, 5, 128))
    with pytest.raises(ValueError, match=message):
        layer.update(keys, values)
    assert layer.get_seq_length() == 5


def test_exact_in_float64() -> None:
    layer = make(64, 4)
    new = shaped(1, 2, 5, 64, dtype=torch.float64)
    with pytest.raises(ValueError, match="torch.float64; allowed with these codecs: torch.float32, torch.float16"):
        layer.update(new, new)


@pytest.mark.parametrize("codec", ["exact", "q8_0", "tq3"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("side", ["key", "value"])
def test_nonfinite(side: str, value: float, codec: str) -> None:
    """It names layer, side and position, and leaves the layer as it was."""
    layer = make(0, 4, codec, index=5)
    tokens = {"key": torch.randn(2, 2, 100, 64), "value": torch.randn(2, 2, 100, 64)}
    layer.set_padding(torch.tensor([0, 10]))
    layer.update(tokens["key"], tokens["value"])
    assert layer.table.tokens == 64
    dense = layer.keys.clone()
    more = {"key": torch.randn(2, 2, 50, 64), "value": torch.randn(2, 2, 50, 64)}
    more[side][1, 1, 7, 3] = value
    with pytest.raises(ValueError, match=rf"layer 5: the {side} of position 107 \(row 1, KV head 1\) holds"):
        layer.update(more["key"], more["value"])
    assert torch.equal(layer.keys, dense)
    assert layer.get_seq_length() == 100
    good = torch.randn(2, 2, 50, 64)
    layer.update(good, good)
    assert torch.equal(layer.keys[0, :, :68], dense[0, :, :68])  # sinks and the tile that was there
    assert layer.stats().nonfinite_replaced == 0


@pytest.mark.parametrize("rows", [1, 2])
def test_nonfinite_in_the_prompt(rows: int) -> None:
    layer = make(0, 0, "tq4")
    bad = torch.randn(rows, 2, 100, 64)
    bad[0, 0, 33, 5] = float("nan")

    def prompt() -> None:
        layer.update(bad, bad)
        layer.nothing_to_learn()  # several rows are packed only here

    with pytest.raises(ValueError, match="position 33"):
        prompt()
    layer.reset()
    good = torch.randn(rows, 2, 100, 64)
    layer.update(good, good)
    layer.nothing_to_learn()
    assert layer.table.tokens == 64


def test_nonfinite_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVPACK_NONFINITE", "zero")
    layer = make(0, 0, "tq4")
    bad = torch.randn(1, 2, 64, 64)
    good = bad.clone()
    bad[0, 0, 33, 5], bad[0, 1, 2, 3] = float("nan"), float("inf")
    good[0, 0, 33, 5] = good[0, 1, 2, 3] = 0
    layer.update(bad, good)
    assert layer.stats().nonfinite_replaced == 2
    twin = make(0, 0, "tq4")
    twin.update(good, good)
    assert torch.equal(layer.keys, twin.keys)


def test_nonfinite_word(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVPACK_NONFINITE", "ignore")
    with pytest.raises(ValueError, match="KVPACK_NONFINITE='ignore' is not allowed: error .default. or zero"):
        make(0, 0, "tq4").update(torch.randn(1, 1, 64, 64), torch.randn(1, 1, 64, 64))


def test_scale_that_overflows() -> None:
    layer = make(0, 0, "tq4", index=2)
    new = torch.full((1, 1, 64, 64), 1e30)
    with pytest.raises(ValueError, match="layer 2: .*scale"):
        layer.update(new, new)
    tiny = torch.full((1, 1, 64, 64), 1e-30)
    layer.update(tiny, tiny)
    assert not layer.keys.any()


def test_positive_crop() -> None:
    model = h.llama()
    cache = h.packed(model)
    h.run(model, cache, h.tokens(1, 50), [50])
    with pytest.raises(ValueError, match=r"crop\(10\): allowed is a negative number"):
        cache.crop(10)
    with pytest.raises(ValueError, match=r"crop\(10\): allowed is a negative number"):
        cache.layers[1].crop(10)
    assert cache.get_seq_length() == 50
    cache.crop(0)
    assert cache.get_seq_length() == 50
    cache.crop(-1000)
    assert cache.get_seq_length() == 0


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("length", [2, 5, 150])
def test_generating_without_use_cache(attention: str, rows: int, length: int) -> None:
    """A user's cache with use_cache=False takes in the whole prompt on every step: refused, not wrong."""
    model = h.llama(2, attention)
    with pytest.raises(RuntimeError, match="the whole prompt arrived a second time.*use_cache=True"):
        h.generate(model, h.packed(model), h.tokens(rows, length), new=3, use_cache=False)


def test_generating_without_use_cache_padded() -> None:
    model = h.llama()
    ids, mask = h.padded([100, 60])
    with pytest.raises(RuntimeError, match="the whole prompt arrived a second time"):
        h.generate(model, h.packed(model), ids, new=3, attention_mask=mask, use_cache=False)


def test_a_turn_that_repeats_the_text_is_no_error() -> None:
    """The same words at later positions have other keys."""
    model = h.llama()
    ids = h.tokens(1, 100)
    again = torch.cat((ids, ids, ids[:, :1]), dim=1)
    ours, theirs = h.packed(model), h.stock(model)
    assert h.error(h.run(model, ours, again, [100, 101]), h.run(model, theirs, again, [100, 101])) <= 1e-4


def test_a_cache_implementation_beside_the_cache() -> None:
    model = h.llama()
    with pytest.raises(ValueError, match="cache_implementation"):
        h.generate(model, h.packed(model), h.tokens(1, 5), cache_implementation="static")


def test_a_layer_that_is_gone() -> None:
    """Compiled code finds layers by number; one that no longer lives is an error."""
    from kvpack.hf import page_ops

    layer: PackedLayer | None = make(0, 0)
    writer = layer.writer.clone()
    table, used = torch.zeros(1, 4, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
    new = torch.zeros(1, 1, 64, 64)
    layer = None
    with pytest.raises(RuntimeError, match="no longer exists"):
        page_ops.write_tiles(table, used, new, new, writer, [0, 64, 0, 64, 1])


def test_stock_caches_are_left_alone() -> None:
    """Importing kvpack changes nothing about transformers."""
    model = h.llama()
    cache = DynamicCache(config=model.config)
    h.run(model, cache, h.tokens(1, 10), [10])
    assert type(cache.layers[0]).__name__ == "DynamicLayer"
    assert kvpack.nbytes(cache) == 2 * 2 * 2 * 10 * 64 * 4
