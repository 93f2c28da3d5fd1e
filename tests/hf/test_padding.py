"""Left padding: learned from masks or told; masked, stored as zeros, and never a sink."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch

import kvpack
from kvpack import ops
from kvpack.hf import PackedLayer, padding

from . import helpers as h
from .test_window import make

LENGTHS = [230, 31, 120, 229]


def alone(model: Any, ids: torch.Tensor, lengths: list[int], row: int, chunks: list[int], **options: Any) -> Any:
    """Logits of one row without its padding."""
    return h.run(model, h.packed(model, **options), ids[row : row + 1, ids.shape[1] - lengths[row] :], chunks)


@pytest.mark.parametrize("told", ["by the mask", "before"])
@pytest.mark.parametrize("window", [0, 64])
def test_a_padded_row_is_the_row_alone(told: str, window: int) -> None:
    model = h.llama()
    prompt, mask = h.padded(LENGTHS)
    more = h.tokens(len(LENGTHS), 150, seed=9)
    ids, mask = torch.cat((prompt, more), 1), torch.cat((mask, torch.ones_like(more)), 1)
    options = {"attention_mask": mask} if told == "before" else {}
    cache = h.packed(model, window=window, **options)
    got = h.run(model, cache, ids, [prompt.shape[1]], mask)
    for row, length in enumerate(LENGTHS):
        want = alone(model, ids, [n + 150 for n in LENGTHS], row, [length], window=window)
        assert h.error(got[row, -150 - length :], want[0]) <= 1e-4
    layer = cache.packed_layers[0]
    assert layer.pads.tolist() == [230 - n for n in LENGTHS]
    assert layer.rows[:, 1].tolist() == [230 - n for n in LENGTHS]
    assert layer.stats().late_padding == 0
    assert layer.stats().fallback_calls == {}


def test_generation_with_padding() -> None:
    """Through generate: each row continues as it would alone."""
    model = h.llama()
    ids, mask = h.padded(LENGTHS)
    got, _ = h.generate(model, h.packed(model), ids, new=100, attention_mask=mask)
    for row, length in enumerate(LENGTHS):
        want, _ = h.generate(model, h.packed(model), ids[row : row + 1, 230 - length :], new=100)
        assert torch.equal(got[row, 230:], want[0, length:])


def placed(codec: str = "tq4", sinks: int = 4) -> tuple[PackedLayer, torch.Tensor, list[int]]:
    """A layer with a padded prompt of 300 tokens, placed."""
    torch.manual_seed(0)
    pads = [0, 100, 299, 64, 297]
    layer = make(0, sinks, codec)
    layer.set_padding(torch.tensor(pads))
    new = torch.randn(len(pads), 2, 300, 64)
    layer.update(new, new)
    return layer, new, pads


@pytest.mark.parametrize("codec", ["tq4", "tq4:center=tile", "tcq2"])
def test_padding_encodes_as_zeros_and_sinks_are_real(codec: str) -> None:
    layer, new, pads = placed(codec)
    zero, _ = ops.encode(torch.zeros(1, 64, 64), layer.layout[0], 0)
    size = ops.record_bytes(layer.layout)
    for row, pad in enumerate(pads):
        start = min(pad, 296)
        assert layer.rows[row].tolist() == [pad, start]
        for sink in range(4):
            position = start + sink
            want = new[row, :, position] if position >= pad else torch.zeros(2, 64)
            assert torch.equal(layer.sinks[0][row, :, sink], want)
        dense = layer.keys[row]
        if codec != "tq4:center=tile":  # what shares a tile with tokens is their mean there
            assert not dense[:, : min(pad, start)].any()
        assert not dense[:, : min(pad, start) // 64 * 64].any()
        side = ops.side_bytes(layer.layout[0], 64, 0)
        for tile in range(layer.table.tiles):
            page, slot = divmod(tile, 4)
            record = layer.table.rows[row][page].data.view(2, -1)[0, slot * size : (slot + 1) * size]
            scales, codes = record[:128], record[2 * 128 : 2 * 128 + side - 128]
            key = torch.cat((scales, codes))
            assert torch.equal(key, zero[0, 0]) == (64 * (tile + 1) <= start)


def test_exact_tokens_lie_at_their_positions() -> None:
    layer, new, pads = placed("exact")
    want = new.clone()
    for row, pad in enumerate(pads):
        want[row, :, :pad] = 0
    assert torch.equal(layer.keys, want)
    more = torch.randn(len(pads), 2, 200, 64)
    key, _ = layer.update(more, more)
    assert torch.equal(key.dense(), torch.cat((want, more), dim=2))


@pytest.mark.parametrize("left", [1, 2, 3, 4, 5, 63, 64, 68, 69, 100, 101, 103, 104, 150, 296, 299])
@pytest.mark.parametrize("sinks", [0, 4])
def test_crop_into_and_before_the_sinks(left: int, sinks: int) -> None:
    """Rows whose sinks would lie beyond the end have only padding before them, which can move."""
    layer, new, pads = placed("exact", sinks)
    layer.crop(left - 300)
    want = new[:, :, :left].clone()
    for row, pad in enumerate(pads):
        want[row, :, :pad] = 0
    assert torch.equal(layer.keys, want)
    more = torch.randn(len(pads), 2, 150, 64)
    for part in more.split([1, 2, 147], dim=2):
        key, value = layer.update(part, part)
        want = torch.cat((want, part), dim=2)
        assert torch.equal(layer.keys, want)
        query = torch.randn(len(pads), 2, 1, 64)
        mask = torch.arange(want.shape[2])[None] >= torch.tensor(pads).clamp(max=left)[:, None]
        got = torch.nn.functional.scaled_dot_product_attention(query, key, value)
        told = torch.nn.functional.scaled_dot_product_attention(query, want, want, mask[:, None, None])
        torch.testing.assert_close(got, told, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("chunk", [20, 50, 100, 200])
def test_chunks_of_nothing_but_padding(chunk: int) -> None:
    """A long padding that goes on over several calls is waited for."""
    model = h.llama()
    ids, mask = h.padded([230, 60])
    cache = h.packed(model, window=0)
    got = h.run(model, cache, ids, [chunk] * 12, mask)
    assert cache.packed_layers[0].rows.tolist() == [[0, 0], [170, 170]]
    assert cache.packed_layers[0].pending is None
    want = h.run(model, h.packed(model, window=0), ids[1:, 170:], [60])
    assert h.error(got[1, 170:], want[0]) <= 1e-4


@pytest.mark.filterwarnings(h.DECODED)
def test_eager_attention_is_told() -> None:
    model = h.llama(2, "eager")
    prompt, mask = h.padded(LENGTHS)
    ids = torch.cat((prompt, h.tokens(4, 20, seed=9)), 1)
    longer = torch.cat((mask, torch.ones(4, 20, dtype=torch.int64)), 1)
    cache = h.packed(model, attention_mask=mask)
    h.run(model, cache, ids, [230], longer)
    assert cache.packed_layers[0].rows[:, 0].tolist() == [230 - n for n in LENGTHS]
    silent = h.packed(model)
    h.run(model, silent, ids, [230], longer)
    assert silent.packed_layers[0].rows is None


def test_late_padding_is_warned_of_and_counted() -> None:
    model = h.llama()
    ids, mask = h.padded([100, 80])
    cache = h.packed(model)
    with pytest.warns(UserWarning, match="left padding became known only after"):
        got = h.run(model, cache, ids[1:], [99], mask[1:])  # one row: the prompt is not intercepted
    assert [stats.late_padding for stats in cache.stats()] == [20, 20]
    want = h.run(model, h.packed(model), ids[1:, 20:], [79])
    assert h.error(got[0, 20:], want[0]) <= 1e-4  # still masked
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cache.set_padding(mask[1:])  # it is known by now


def test_set_padding_too_late() -> None:
    model = h.llama()
    cache = h.packed(model)
    h.run(model, cache, h.tokens(2, 50), [50])
    layer = cache.packed_layers[0]
    assert layer.padding_known  # its mask was seen: there is none
    eager = h.packed(h.llama(2, "eager"))
    h.run(h.llama(2, "eager"), eager, h.tokens(2, 50), [50])
    with pytest.warns(UserWarning, match="left padding became known only after"):
        eager.set_padding(torch.tensor([[1] * 50, [0] * 10 + [1] * 40]))
    assert eager.stats()[0].late_padding == 10


def test_set_padding_while_pending() -> None:
    layer = make(0, 4)
    new = torch.randn(2, 1, 200, 64)
    layer.update(new, new)
    assert layer.pending is not None
    layer.set_padding(torch.tensor([0, 50]))
    assert layer.pending is None
    assert layer.rows.tolist() == [[0, 0], [50, 50]]


def test_reset_forgets_padding() -> None:
    model = h.llama()
    ids, mask = h.padded([100, 80])
    cache = h.packed(model, attention_mask=mask)
    h.run(model, cache, ids, [100], mask)
    cache.reset()
    h.run(model, cache, ids, [100])
    assert cache.packed_layers[0].rows is None


def test_rows_keep_their_padding() -> None:
    """Reorder, select and repeat move it along."""
    model = h.llama()
    ids, mask = h.padded([90, 40, 70])
    cache = h.packed(model, window=0)
    h.run(model, cache, ids, [90], mask)
    cache.reorder_cache(torch.tensor([2, 2, 1]))
    cache.batch_select_indices(torch.tensor([0, 2]))
    cache.batch_repeat_interleave(2)
    order = [2, 2, 1, 1]
    assert cache.packed_layers[0].rows[:, 0].tolist() == [20, 20, 50, 50]
    more = h.tokens(4, 80, seed=3)
    longer = torch.cat((ids[order], more), 1), torch.cat((mask[order], torch.ones_like(more)), 1)
    got = h.run(model, cache, longer[0], [], longer[1])
    for row, source in enumerate(order):
        pad = [0, 50, 20][source]
        want = h.run(model, h.packed(model, window=0), longer[0][row : row + 1, pad:], [90 - pad])
        assert h.error(got[row], want[0, 90 - pad :]) <= 1e-4


def test_reading_masks() -> None:
    mask = torch.tensor([[0, 0, 1, 1, 0], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0]])
    assert padding.from_attention_mask(mask).tolist() == [2, 0, 5]
    causal = torch.ones(5, 5).tril().bool()
    seen = causal[None, None] & mask.bool()[:, None, None]
    assert padding.from_attention(seen, 3).tolist() == [2, 0, 5]
    for low in (float("-inf"), torch.finfo(torch.float32).min, -1e9):
        assert padding.from_attention(torch.zeros(3, 1, 5, 5).masked_fill(~seen, low), 3).tolist() == [2, 0, 5]
    half = torch.zeros(3, 1, 5, 5, dtype=torch.float16).masked_fill(~seen, torch.finfo(torch.float16).min)
    assert padding.from_attention(half, 3).tolist() == [2, 0, 5]
    assert padding.from_attention(causal, 2) is None
    # What the last query does not see, others may: two texts in one sequence are no padding.
    blocks = torch.block_diag(torch.ones(2, 2).tril(), torch.ones(3, 3).tril()).bool()
    assert padding.from_attention(blocks, 2) is None


def test_the_mask_of_the_cache_must_have_its_rows() -> None:
    model = h.llama()
    cache = h.packed(model, attention_mask=torch.ones(3, 10))
    with pytest.raises(ValueError, match="the padding mask has 3 rows, the cache has 2"):
        h.run(model, cache, h.tokens(2, 10), [10])
    with pytest.raises(ValueError, match="the padding mask has shape"):
        kvpack.Cache(model.config, attention_mask=torch.ones(10))
