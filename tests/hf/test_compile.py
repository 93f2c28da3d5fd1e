"""torch.compile traces model and cache together, in one graph."""

from __future__ import annotations

import pytest
import torch

from . import helpers as h

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*lru_cache:UserWarning"),
]


@pytest.fixture(autouse=True)
def fresh() -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


def graphs() -> int:
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


@pytest.mark.parametrize(("backend", "rows", "prompt"), [("eager", 2, 100), ("aot_eager", 1, 1300)])
def test_prompt_and_decoding_in_one_graph(backend: str, rows: int, prompt: int) -> None:
    """fullgraph, over window, packing and growing tables; a second cache needs no further graph."""
    model = h.llama()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    ids = h.tokens(rows, prompt + 320)
    ours, twin = (h.packed(model, key="tq4", window=64) for _ in range(2))
    got = h.run(compiled, ours, ids, [prompt])
    want = h.run(model, twin, ids, [prompt])
    assert h.error(got, want) <= 1e-5
    assert ours.packed_layers[0].table.tokens == twin.packed_layers[0].table.tokens > prompt
    for a, b in zip(ours.packed_layers, twin.packed_layers, strict=True):
        assert torch.equal(a.keys, b.keys)
        assert a.table.used.item() == a.table.tiles
        assert a.stats() == b.stats()  # calls are counted inside of graphs too
    assert ours.nbytes == pytest.approx(twin.nbytes, rel=0.001)
    before = graphs()
    assert before <= 8
    again = h.packed(model, key="tq4", window=64)
    assert torch.equal(h.run(compiled, again, ids, [prompt]), got)
    assert graphs() == before
    # Compiled and eager calls may alternate on one cache.
    more = torch.cat((ids, h.tokens(rows, 80, seed=2)), dim=1)
    mixed = torch.cat((h.run(model, ours, more[:, :-70], []), h.run(compiled, ours, more, [])), dim=1)
    assert h.error(mixed, h.run(model, twin, more, [])) <= 1e-5


def test_inductor() -> None:
    model = h.small()
    compiled = torch.compile(model, fullgraph=True)
    ids = h.tokens(1, 180)
    ours = h.packed(model, window=16)
    got = torch.cat((h.run(model, ours, ids[:, :60], [60]), h.run(compiled, ours, ids, [])), dim=1)
    assert h.error(got, h.run(model, h.stock(model), ids, [60])) <= 1e-4
    assert ours.packed_layers[0].table.tokens == 128


def test_dense_path_in_a_graph() -> None:
    model = h.small()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    ids = h.tokens(2, 180)
    ours = h.packed(model, window=16, fused=False)
    assert h.error(h.run(compiled, ours, ids, [60]), h.run(model, h.stock(model), ids, [60])) <= 1e-5
    twin = h.packed(model, window=16, fused=False)
    h.run(model, twin, ids, [60])
    assert ours.stats()[0].packed_tokens_read == twin.stats()[0].packed_tokens_read > 0
    assert set(ours.stats()[0].fallback_calls) == {"fused=False"}


def test_padded_prompt_in_a_graph() -> None:
    model = h.small()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    prompt, mask = h.padded([150, 90])
    ids = torch.cat((prompt, h.tokens(2, 20, seed=9)), 1)
    mask = torch.cat((mask, torch.ones(2, 20, dtype=torch.int64)), 1)
    ours = h.packed(model, window=16)
    got = h.run(compiled, ours, ids, [150], mask)
    assert ours.packed_layers[0].rows.tolist() == [[0, 0], [60, 60]]
    want = h.run(model, h.packed(model, window=16), ids[1:, 60:], [90])
    assert h.error(got[1, 60:], want[0]) <= 1e-4


def test_operators() -> None:
    """The operators of the graph hold to the rules of torch.compile."""
    from kvpack.hf import page_ops

    layer = h.packed(h.llama(), key="tq4", window=0).packed_layers[0]
    new = torch.randn(2, 2, 200, 64)
    layer.update(new, new)
    layer.nothing_to_learn()
    table = layer.table
    common = (table.addresses, table.counts, table.used)
    checks = ("test_schema", "test_faketensor")
    args = (*common, 1, 0, layer.layout, torch.float32, 128, layer.writer, "dense")
    torch.library.opcheck(page_ops.decode_tiles, args, test_utils=checks)
    extras = (None, None, torch.zeros(4), layer.layout, 0.1, 30.0, 0, 0.0, layer.writer)
    args = (torch.randn(2, 4, 1, 64), *common, 0, None, None, new, new, *extras)
    torch.library.opcheck(page_ops.attend_tiles, args, test_utils=checks)
