"""The window rule: which tokens are packed when, whatever the calls."""

from __future__ import annotations

import random

import pytest
import torch

from kvpack.hf import PackedLayer
from kvpack.reference import packed_tokens
from kvpack.spec import parse


def make(window: int, sinks: int, codec: str = "exact", **options: object) -> PackedLayer:
    return PackedLayer(parse(codec), parse(codec), window=window, sinks=sinks, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("window", [0, 1, 63, 64, 128])
@pytest.mark.parametrize("sinks", [0, 4, 100])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_counts_follow_the_rule(window: int, sinks: int, seed: int) -> None:
    layer = make(window, sinks)
    rng = random.Random(seed)
    length = 0
    history = torch.zeros(1, 1, 0, 64)
    while length < 900:
        count = rng.choice([1, 1, 2, 5, 63, 64, 65, 130, 300])
        new = torch.randn(1, 1, count, 64)
        found = packed_tokens(length, window, sinks)
        assert layer.table.tokens == found
        key, _ = layer.update(new, new)
        if length:
            assert key.call.packed == found  # what the call reads
            assert key.call.length == length + count
        history = torch.cat((history, new), dim=2)
        length += count
        assert layer.length == layer.get_seq_length() == length
        assert layer.table.tokens == packed_tokens(length, window, sinks)
        if length >= window + sinks:
            assert window <= layer.window_count <= window + 63
        assert layer.sink_count == min(sinks, length)
        assert torch.equal(layer.keys, history)
        assert torch.equal(layer.values, history)
        if length > count:
            assert torch.equal(key.dense(), history)
    assert layer.get_mask_sizes(3) == (length + 3, 0)
    assert layer.get_max_length() == -1


def test_handles_of_earlier_calls_stay_true() -> None:
    """Within an epoch, packing and growth leave what older handles read as it was."""
    layer = make(0, 2, "tq4")
    new = torch.randn(1, 2, 70, 64)
    layer.update(new, new)
    kept = []
    for _ in range(30):
        new = torch.randn(1, 2, 40, 64)
        key, _ = layer.update(new, new)
        kept.append((key, layer.table.tokens, key.call.dense(0).clone()))
    for key, _, dense in kept:
        assert torch.equal(key.dense(), dense)


def test_each_token_is_packed_once_from_its_original() -> None:
    """However they were divided into calls, the same tokens become the same bytes."""
    torch.manual_seed(0)
    tokens = torch.randn(1, 2, 600, 64)
    pages = []
    for chunks in ([600], [1] * 600, [100, 300, 200]):
        layer = make(64, 4, "tq3")
        for part in tokens.split(chunks, dim=2):
            layer.update(part, part)
        assert layer.table.tiles == 8
        pages.append([page.data for page in layer.table.rows[0]])
    for other in pages[1:]:
        assert all(torch.equal(a, b) for a, b in zip(pages[0], other, strict=True))


def test_zero_tokens_change_nothing() -> None:
    layer = make(64, 4)
    empty = torch.zeros(1, 2, 0, 64)
    key, value = layer.update(empty, empty)
    assert key.shape == value.shape == (1, 2, 0, 64)
    assert layer.get_seq_length() == 0
    assert layer.keys is None
    new = torch.randn(1, 2, 300, 64)
    layer.update(new, new)
    key, value = layer.update(empty, empty)
    assert tuple(key.shape) == (1, 2, 300, 64)
    assert torch.equal(key.dense(), new)
    assert torch.equal(value.dense(), new)
    out = torch.nn.functional.scaled_dot_product_attention(torch.randn(1, 2, 1, 64), key, value)
    assert out.shape == (1, 2, 1, 64)
    assert layer.get_seq_length() == 300


def test_a_window_of_nothing_and_no_sinks() -> None:
    layer = make(0, 0)
    new = torch.randn(1, 1, 128, 64)
    layer.update(new, new)
    assert layer.window_count == 0
    empty = torch.zeros(1, 1, 0, 64)
    key, value = layer.update(empty, empty)  # attention over tiles alone
    query = torch.randn(1, 1, 1, 64)
    got = torch.nn.functional.scaled_dot_product_attention(query, key, value)
    want = torch.nn.functional.scaled_dot_product_attention(query, new, new)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
