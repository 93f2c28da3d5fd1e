"""attend against the reference, and the cost of its public function."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest
import torch

from kvpack import ops, reference

from .helpers import DTYPES, Case, Implementation, make_cache, quick_or_full, rows

CODECS = reference.CODECS
CENTRED = [
    (f"tq4:center={key}", f"{value}:center={center}")
    for key, center in (("tile", "mean"), ("mean", "tile"), ("tile", "none"), ("none", "mean"))
    for value in ("tq3", "tcq2", "rq4_0")
]


def check(impl: Implementation, case: Case) -> None:
    dtype = case.query.dtype
    want = case.expected()
    for precision in (0, 1):
        got = impl.attend(*case.arguments(precision))
        assert got.shape == want.shape
        assert got.dtype == dtype
        assert got.is_contiguous()
        if impl.name == "default":
            limit = 1e-5 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps
            np.testing.assert_allclose(got.float().numpy(), want, rtol=limit, atol=limit)
            continue
        # The native kernels quantize queries and weights; tests of their own hold them to tighter bounds.
        error = np.linalg.norm(got.double().numpy() - want) / max(1e-6, float(np.linalg.norm(want)))
        assert error < (2e-2 if precision == 0 else 5e-3) + 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("key", "value", "dk", "dv"),
    [
        ("tq4", "tq3", 128, 128),
        ("tq4", "tq3", 128, 64),
        ("tq2", "q8_0", 64, 256),
        ("q8_0", "tq4", 256, 64),
        ("q4_0", "tq2", 64, 64),
        ("exact", "exact", 128, 64),
        ("tq3", "exact", 64, 128),
        ("tq3", "q4_0", 80, 112),
        ("q4_0", "tq3", 112, 80),
        ("exact", "tq4", 96, 160),
        ("tq3", "exact", 112, 96),
        ("q8_0", "tq2", 80, 192),
        ("tq4", "q8_0", 192, 112),
    ],
)
def test_codecs(impl: Implementation, key: str, value: str, dk: int, dv: int, dtype: str) -> None:
    cache = make_cache(key, value, key_dim=dk, value_dim=dv, batch=2, counts=(64,) * 5, dtype=dtype)
    check(impl, Case(cache, sinks=4, exact=70, queries=2, causal=True, dtype=dtype))


@pytest.mark.parametrize("d", [64, *(quick_or_full(d, (80,)) for d in reference.HEAD_SIZES[1:])])
@pytest.mark.parametrize("name", CODECS)
def test_every_codec_on_either_side(impl: Implementation, name: str, d: int) -> None:
    for key, value in ((name, "tq4"), ("tq4", name)):
        cache = make_cache(key, value, key_dim=d, value_dim=d, counts=(64, 64, 30))
        check(impl, Case(cache, sinks=2, exact=20))


@pytest.mark.parametrize(("key", "value"), [*CENTRED, ("tcq4:center=tile", "tcq1:center=tile")])
def test_centred(impl: Implementation, key: str, value: str) -> None:
    """Tokens with an offset of twice their size, over a page and a part of the next; all that changes scores."""
    cache = make_cache(key, value, key_dim=64, value_dim=80, batch=2, counts=(64, 64, 64, 20, 64, 64), shift=4.0)
    logits = torch.tensor([0.5, -3.0, 20.0, 4.0])
    check(impl, Case(cache, sinks=4, exact=30, queries=3, causal=True))
    check(impl, Case(cache, sinks=2, exact=9, softcap=5.0))
    check(impl, Case(cache, exact=9, queries=2, sink_logits=logits, rows=rows((0, 0), (70, 0))))
    check(impl, Case(cache, query_heads=14, queries=5, sink_logits=logits[:1].repeat(14), softcap=2.0))


@pytest.mark.parametrize("group", [1, 2, 7])
@pytest.mark.parametrize("queries", [1, 3, 70])
def test_groups_and_queries(impl: Implementation, group: int, queries: int) -> None:
    cache = make_cache(batch=2, heads=2, counts=(64,) * 3)
    check(impl, Case(cache, query_heads=2 * group, queries=queries, exact=90, causal=True))
    check(impl, Case(cache, query_heads=2 * group, queries=queries, exact=90))


@pytest.mark.parametrize(
    ("counts", "sinks", "exact"),
    [
        ((64, 64), 0, 0),
        ((64, 64), 4, 0),
        ((64, 17, 64, 1, 64), 0, 3),
        ((), 0, 5),
        ((), 4, 0),
        ((), 3, 200),
        ((1,), 1, 1),
    ],
)
def test_parts(impl: Implementation, counts: tuple[int, ...], sinks: int, exact: int) -> None:
    check(impl, Case(make_cache(batch=2, counts=counts), sinks=sinks, exact=exact))


def test_one_row_one_head(impl: Implementation) -> None:
    check(impl, Case(make_cache(heads=1), query_heads=1, exact=1))


def test_padding_and_sink_positions(impl: Implementation) -> None:
    cache = make_cache(batch=4, counts=(64, 64))
    case = Case(cache, sinks=4, exact=40, queries=3, causal=True)
    # No padding; sinks behind 10 padded tokens; padding into the sinks; sinks in the exact tokens.
    case.options["rows"] = rows((0, 0), (10, 10), (12, 10), (130, 130))
    check(impl, case)


@pytest.mark.parametrize("kind", ["bool", "float32", "float16"])
@pytest.mark.parametrize("shape", [(2, 4, 3), (1, 1, 1), (2, 1, 1), (1, 4, 1), (2, 1, 3)])
def test_masks_are_by_position(impl: Implementation, shape: tuple[int, int, int], kind: str) -> None:
    case = Case(make_cache(batch=2), sinks=4, exact=20, queries=3, rows=rows((0, 0), (9, 9)))
    generator = torch.Generator().manual_seed(7)
    size = (*shape, case.positions)
    mask = torch.rand(size, generator=generator) < 0.7
    if kind != "bool":
        noise = torch.randn(size, generator=generator)
        mask = noise.masked_fill(~mask, -torch.inf).to(DTYPES[kind])
    case.options["mask"] = mask
    check(impl, case)
    wider = torch.zeros((*shape, case.positions + 7), dtype=mask.dtype)
    wider[..., : case.positions] = mask
    case.options["mask"] = wider[..., : case.positions]  # a slice, as of a static mask
    check(impl, case)


def test_the_lowest_finite_mask_hides(impl: Implementation) -> None:
    case = Case(make_cache(), exact=20)
    hidden = torch.zeros(1, 1, 1, case.positions)
    hidden[..., :60] = torch.finfo(torch.float32).min
    case.options["mask"] = hidden
    check(impl, case)


@pytest.mark.parametrize("dtype", DTYPES)
def test_softcap_and_sink_logits(impl: Implementation, dtype: str) -> None:
    cache = make_cache(batch=2, dtype=dtype)
    logits = torch.tensor([0.5, -3.0, 20.0, 4.0])
    for options in ({"softcap": 5.0}, {"sink_logits": logits}, {"softcap": 2.0, "sink_logits": logits}):
        check(impl, Case(cache, sinks=2, exact=9, dtype=dtype, **options))


@pytest.mark.parametrize("logits", [False, True])
def test_nothing_to_attend_to_gives_zeros(impl: Implementation, logits: bool) -> None:
    extra = torch.full((4,), 1.5) if logits else None
    case = Case(make_cache(batch=2), sinks=4, exact=8, queries=2, sink_logits=extra)
    mask = torch.ones(2, 1, 2, case.positions, dtype=torch.bool)
    mask[1, :, 0] = False
    case.options["mask"] = mask
    got = impl.attend(*case.arguments())
    assert torch.equal(got[1, :, 0], torch.zeros(4, 128))
    assert not (got[1, :, 1] == 0).any()
    check(impl, case)
    padded = Case(make_cache(batch=1), exact=8, rows=rows((136, 0)), sink_logits=extra)
    assert torch.equal(impl.attend(*padded.arguments()), torch.zeros(1, 4, 1, 128))
    empty = Case(make_cache(counts=()), exact=0, sink_logits=extra)
    assert torch.equal(impl.attend(*empty.arguments()), torch.zeros(1, 4, 1, 128))


def test_no_queries(impl: Implementation) -> None:
    case = Case(make_cache(), queries=0, exact=4)
    assert impl.attend(*case.arguments()).shape == (1, 4, 0, 128)


@pytest.mark.parametrize("axes", [(1, 2), (2, 3)])
def test_strides(impl: Implementation, axes: tuple[int, int]) -> None:
    case = Case(make_cache(batch=2), queries=3, exact=9)
    assert case.exact is not None
    dense = impl.attend(*case.arguments())
    case.query = case.query.transpose(*axes).contiguous().transpose(*axes)
    keys, values = (x.transpose(*axes).contiguous().transpose(*axes) for x in case.exact)
    case.exact = keys, values
    assert torch.equal(impl.attend(*case.arguments()), dense)


def test_public_function_costs_less_than_two_microseconds() -> None:
    case = Case(make_cache(counts=()), exact=1)
    arguments = case.arguments(0)
    got = ops.attend(*arguments)
    assert torch.equal(got, torch.ops.kvpack.attend(*arguments))
    named = dict(zip(ops.attend.__code__.co_varnames, arguments, strict=False))
    assert torch.equal(got, ops.attend(**named))

    def stub(*_: Any) -> None:
        return None

    original = ops._attend_op
    try:
        ops._attend_op = stub
        repeats = 2000
        best = min(_seconds(ops.attend, arguments, repeats) for _ in range(5))
    finally:
        ops._attend_op = original
    assert best / repeats < 2e-6


def _seconds(function: Any, arguments: list[Any], repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        function(*arguments)
    return time.perf_counter() - start


def test_keys_and_values_may_have_room_for_more(impl: Implementation) -> None:
    case = Case(make_cache(), sinks=4, exact=9)
    case.exact = tuple(x.contiguous() for x in case.exact or ())  # type: ignore[assignment]
    arguments = case.arguments()
    for exact in (0, 5, 9):
        fewer = [*arguments[:5], *(x[:, :, :exact] for x in arguments[5:7]), *arguments[7:]]
        got = impl.attend(*arguments, 0.0, exact)
        assert torch.equal(got, impl.attend(*fewer))
    assert torch.equal(got, impl.attend(*arguments))
