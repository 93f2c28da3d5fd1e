"""Pages are shared copy-on-write between rows, forks and beams; nobody sees another's tokens."""

from __future__ import annotations

import copy
import pickle
import random

import pytest
import torch

import kvpack
from kvpack.hf import PackedLayer
from kvpack.hf.pages import Page

from . import helpers as h
from .test_window import make


def fill(layer: PackedLayer, count: int, rows: int = 1) -> torch.Tensor:
    new = torch.randn(rows, 2, count, 64)
    layer.update(new, new)
    layer.nothing_to_learn()
    return new


def used_bytes(layer: PackedLayer) -> list[bytes]:
    """The bytes of every slot in use."""
    layout = layer.layout
    heads, record, head = layout[4], kvpack.ops.record_bytes(layout), kvpack.ops.head_bytes(layout)
    out = []
    for row in layer.table.rows:
        for p, page in enumerate(row):
            slots = min(4, layer.table.tiles - 4 * p)
            out.append(page.data.view(heads, head)[:, : slots * record].clone().numpy().tobytes())
    return out


def distinct(*layers: PackedLayer) -> set[int]:
    return {id(page) for layer in layers for row in layer.table.rows for page in row}


def test_a_fork_shares_pages_and_writes_on_its_own() -> None:
    torch.manual_seed(0)
    layer = make(0, 0, "tq4")
    fill(layer, 6 * 64)  # one full page, and one with two slots
    fork = copy.deepcopy(layer)
    assert distinct(layer) == distinct(fork)
    before = used_bytes(layer)
    keys = layer.keys.clone()

    fill(fork, 64)  # the first to go on takes the free slot in place
    assert len(distinct(layer, fork)) == 2
    assert used_bytes(layer) == before
    fork_bytes = used_bytes(fork)
    fill(layer, 64)  # the second finds it taken, and takes a copy of the slots it uses
    assert len(distinct(layer, fork)) == 3
    assert used_bytes(fork) == fork_bytes
    assert used_bytes(layer)[0] == before[0]
    assert torch.equal(layer.keys[:, :, : 6 * 64], keys)
    assert torch.equal(fork.keys[:, :, : 6 * 64], keys)
    assert not torch.equal(layer.keys, fork.keys)


@pytest.mark.parametrize(
    "codec", ["tq4:center=tile", "tq3:center=mean", "tcq2:center=tile", "tq2.5:center=tile", "tq3.5:center=mean"]
)
def test_copies_keep_their_means(codec: str) -> None:
    torch.manual_seed(0)
    layer = make(0, 4, codec)
    offset = 20 * torch.randn(1, 2, 1, 64)

    def append(to: PackedLayer, count: int) -> torch.Tensor:
        new = torch.randn(1, 2, count, 64) + offset
        to.update(new, new)
        to.nothing_to_learn()
        return new

    first = append(layer, 4 + 6 * 64)
    kept = layer.keys.clone()
    assert (kept - first).norm() < (first - offset).norm()
    forks = [layer, *(copy.deepcopy(layer) for _ in range(2))]
    more = [append(fork, 3 * 64) for fork in forks]  # in place, then on copies
    assert len(distinct(*forks)) == 1 + 3 + 3  # the full page once, of each fork the page they began in and the next
    for fork, new in zip(forks, more, strict=True):
        assert torch.equal(fork.keys[:, :, : kept.shape[2]], kept)
        assert (fork.keys[:, :, kept.shape[2] :] - new).norm() < (new - offset).norm()
        alone = make(0, 4, codec)
        both = torch.cat((first, new), dim=2)
        alone.update(both, both)
        assert torch.equal(alone.keys, fork.keys)
        assert torch.equal(alone.values, fork.values)
    forks[1].crop(-5 * 64)
    again = append(forks[1], 64)
    assert torch.equal(forks[0].keys[:, :, : kept.shape[2]], kept)
    assert (forks[1].keys[:, :, -64:] - again).norm() < (again - offset).norm()


@pytest.mark.parametrize("codec", ["tq4:center=mean", "tq2.5", "tcq3.5:center=mean"])
def test_a_row_of_padding_freezes_no_mean_of_others(codec: str) -> None:
    """Where all tiles so far are padding, means and maps are not known yet: each fork makes its own."""
    torch.manual_seed(0)
    layer = make(0, 4, codec)
    layer.set_padding(torch.tensor([140, 0]))
    first = torch.randn(2, 2, 152, 64)  # sinks, and two tiles of padding in the first row
    layer.update(first, first)
    kept = layer.keys.clone(), layer.values.clone()
    forks = [layer, *(copy.deepcopy(layer) for _ in range(2))]
    bad = torch.randn(2, 2, 2 * 64, 64)
    bad[:, :, 100] = torch.nan  # a call that fails freezes nothing, either
    with pytest.raises(ValueError, match="allowed are finite values"):
        forks[1].update(bad, bad)
    for fork in forks:
        assert torch.equal(fork.keys, kept[0])
        assert torch.equal(fork.values, kept[1])
    for seed, fork in enumerate(forks):
        alone = make(0, 4, codec)
        alone.set_padding(torch.tensor([140, 0]))
        alone.update(first, first)
        for _ in range(2):
            new = (seed - 1) * 10 + torch.randn(2, 2, 64, 64)
            fork.update(new, new)
            alone.update(new, new)
        assert torch.equal(fork.keys, alone.keys)
        assert torch.equal(fork.values, alone.values)


def test_a_crop_of_one_fork_leaves_the_other_as_it_is() -> None:
    layer = make(0, 2, "tq3")
    fill(layer, 500)
    fork = copy.deepcopy(layer)
    before, dense = used_bytes(layer), layer.keys.clone()
    fork.crop(-333)
    assert fork.length == 167
    assert torch.equal(fork.keys, dense[:, :, :167])
    fill(fork, 400)
    assert used_bytes(layer) == before
    assert torch.equal(layer.keys, dense)
    assert torch.equal(fork.keys[:, :, :167], dense[:, :, :167])


def test_rows_that_were_one_share_until_they_differ() -> None:
    layer = make(0, 0, "tq4")
    fill(layer, 6 * 64)
    layer.batch_repeat_interleave(3)
    assert layer.batch == 3
    assert len(distinct(layer)) == 2
    assert len(set(layer.table.addresses[:, :2].flatten().tolist())) == 2
    fill(layer, 64, rows=3)
    assert len(distinct(layer)) == 4  # the full page once, the last one three times
    first = layer.keys
    assert torch.equal(first[0, :, : 6 * 64], first[2, :, : 6 * 64])
    assert not torch.equal(first[0, :, 6 * 64 :], first[2, :, 6 * 64 :])


def test_pages_are_freed_with_their_last_owner() -> None:
    import gc
    import weakref

    class Watched(Page):
        __slots__ = ("__weakref__",)

    layer = make(0, 0)
    fill(layer, 8 * 64)
    for row in layer.table.rows:
        row[:] = [Watched(page.data, page.filled) for page in row]
    watch = [weakref.ref(page) for page in row]
    del row
    fork = copy.deepcopy(layer)
    layer.reset()
    gc.collect()
    assert all(ref() is not None for ref in watch)
    fork.crop(-5 * 64)
    assert [ref() is not None for ref in watch] == [True, False]
    fork.reset()
    assert watch[0]() is None


def test_pickling_restores_addresses_and_sharing() -> None:
    model = h.llama()
    ids = h.tokens(1, 300)
    ours = h.packed(model, key="tq4")
    h.run(model, ours, ids[:, :250], [250])
    ours.batch_repeat_interleave(2)
    other = pickle.loads(pickle.dumps(ours))
    layer, twin = ours.packed_layers[0], other.packed_layers[0]
    assert used_bytes(layer) == used_bytes(twin)
    assert len(distinct(twin)) == len(distinct(layer))
    assert not distinct(twin) & distinct(layer)
    pair = ids.repeat(2, 1)
    assert torch.equal(h.run(model, other, pair, []), h.run(model, ours, pair, []))


def test_reset_starts_over() -> None:
    model = h.llama()
    ids = h.tokens(1, 200)
    ours = h.packed(model, key="tq4")
    first = h.run(model, ours, ids, [150])
    ours.reset()
    assert ours.get_seq_length() == 0
    assert ours.stats()[0].fused_calls == 0
    assert torch.equal(h.run(model, ours, ids, [150]), first)
    ours.reset()
    assert h.run(model, ours, ids.repeat(3, 1), [150]).shape[0] == 3  # other rows are welcome


@pytest.mark.parametrize("seed", range(6))
def test_random_histories_against_a_dense_oracle(seed: int) -> None:
    """Appends, crops, forks, reorders, selects and repeats, in any order; `exact` holds the very tokens."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    window, sinks = rng.choice([0, 10, 64]), rng.choice([0, 1, 4, 80])
    layer = make(window, sinks)
    dense = torch.zeros(2, 2, 0, 64)
    forks: list[tuple[PackedLayer, torch.Tensor]] = []
    for _ in range(60):
        step = rng.random()
        rows = dense.shape[0]
        if step < 0.45 or dense.shape[2] == 0:
            new = torch.randn(rows, 2, rng.choice([1, 3, 64, 100, 200]), 64)
            layer.update(new, new)
            if rng.random() < 0.5:
                layer.nothing_to_learn()
            dense = torch.cat((dense, new), dim=2)
        elif step < 0.65:
            remove = rng.choice([1, 5, 64, 130, 1000])
            layer.crop(-remove)
            dense = dense[:, :, : max(0, dense.shape[2] - remove)]
        elif step < 0.75:
            index = torch.tensor([rng.randrange(rows) for _ in range(rows)])
            layer.reorder_cache(index)
            dense = dense[index]
        elif step < 0.82:
            index = torch.tensor(sorted(rng.sample(range(rows), rng.randint(1, rows))))
            layer.batch_select_indices(index)
            dense = dense[index]
        elif step < 0.9 and rows < 5:
            layer.batch_repeat_interleave(2)
            dense = dense.repeat_interleave(2, dim=0)
        elif step < 0.95 or not forks:
            forks.append((copy.deepcopy(layer), dense))
        else:
            other = forks.pop(rng.randrange(len(forks)))
            forks.append((layer, dense))
            layer, dense = other
        assert layer.length == dense.shape[2]
        if dense.shape[2]:
            assert torch.equal(layer.keys, dense)
    for fork, want in forks:
        if want.shape[2]:
            assert torch.equal(fork.keys, want)
            assert torch.equal(fork.values, want)


@pytest.mark.parametrize("seed", range(4))
def test_random_histories_of_a_model(seed: int) -> None:
    """The same with a model: fused logits against DynamicCache after every change."""
    rng = random.Random(seed)
    model = h.llama()
    ours, theirs = h.packed(model, window=16), h.stock(model)
    ids = h.tokens(2, 200, seed)
    changes = 0
    for step in range(8):
        a, b = h.run(model, ours, ids, [rng.choice([3, 100])]), h.run(model, theirs, ids, [100])
        assert h.error(a, b) <= 1e-4
        changes = rng.randrange(4)
        rows = ids.shape[0]
        if changes == 0:
            remove = rng.choice([5, 90, 150])
            for cache in (ours, theirs):
                cache.crop(-remove)
            ids = ids[:, : ids.shape[1] - remove]
        elif changes == 1:
            index = torch.tensor([rng.randrange(rows) for _ in range(rows)])
            for cache in (ours, theirs):
                cache.reorder_cache(index)
            ids = ids[index]
        elif changes == 2:
            index = torch.tensor([rng.randrange(rows)])
            for cache in (ours, theirs):
                cache.batch_select_indices(index)
            ids = ids[index]
        elif rows < 4:
            for cache in (ours, theirs):
                cache.batch_repeat_interleave(2)
            ids = ids.repeat_interleave(2, dim=0)
        ids = torch.cat((ids, h.tokens(ids.shape[0], 80, 100 * seed + step)), dim=1)


def test_selecting_with_a_boolean_mask() -> None:
    layer = make(0, 2)
    new = fill(layer, 100, rows=3)
    layer.batch_select_indices(torch.tensor([True, False, True]))
    assert torch.equal(layer.keys, new[[0, 2]])


def test_rows_that_are_not_there() -> None:
    layer = make(0, 2)
    fill(layer, 100, rows=3)
    with pytest.raises(IndexError, match="allowed are 0..2"):
        layer.reorder_cache(torch.tensor([0, 3, 1]))


def test_stale_handles_refuse() -> None:
    for change in (
        lambda layer: layer.crop(-1),
        lambda layer: layer.reorder_cache(torch.tensor([0])),
        lambda layer: layer.batch_repeat_interleave(2),
        lambda layer: layer.batch_select_indices(torch.tensor([0])),
        lambda layer: layer.reset(),
    ):
        layer = make(0, 2)
        fill(layer, 100)
        new = torch.randn(1, 2, 1, 64)
        key, value = layer.update(new, new)
        change(layer)
        with pytest.raises(RuntimeError, match="keys and values of layer 0 were used after"):
            torch.nn.functional.scaled_dot_product_attention(new, key, value)
        with pytest.raises(RuntimeError, match="keys and values of layer 0 were used after"):
            key.transpose(1, 2)
