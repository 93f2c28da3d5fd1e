"""opcheck of every operator, and torch.compile without graph breaks.

These run what the dispatcher picks: the native kernels, or with ``KVPACK_NO_NATIVE=1`` the defaults.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._dynamo
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from kvpack import ops, reference

from .helpers import Case, code, make_cache, new_page, rows

OPS = torch.ops.kvpack


def opcheck(operator: Any, arguments: tuple[Any, ...]) -> None:
    results = torch.library.opcheck(operator, arguments)
    assert set(results.values()) == {"SUCCESS"}
    assert len(results) == 4


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("exact", torch.bfloat16),
        ("q8_0", torch.float32),
        ("tq3:center=tile", torch.float16),
        ("tcq3:center=mean,search", torch.float32),
    ],
)
@pytest.mark.parametrize("shape", [(1, 1, 64, 64), (70, 128), (2, 3, 0, 64), (3, 2, 130, 256)])
def test_opcheck_encode_decode(name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x = torch.randn(*shape).to(dtype)
    strided = torch.randn(*shape[:-1], 2 * shape[-1]).to(dtype)[..., ::2]
    number = code(name, str(dtype).removeprefix("torch."))
    for side in (0, 1):
        opcheck(OPS.encode.default, (x, number, side))
    opcheck(OPS.encode.default, (strided, number, 0))
    opcheck(OPS.decode.default, (*ops.encode(x, number, 0), number, 0, shape[-2], shape[-1], dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_opcheck_rotate(dtype: torch.dtype) -> None:
    for x in (torch.randn(1, 64), torch.randn(2, 128, 3).transpose(1, 2), torch.randn(0, 256)):
        for inverse in (False, True):
            opcheck(OPS.rotate.default, (x.to(dtype), inverse))


CACHES = [
    {"batch": 1, "counts": (64,), "heads": 1},
    {"key_dim": 128, "value_dim": 64, "batch": 2, "counts": (64, 12, 64, 64, 64)},
    {"key": "exact", "value": "q4_0", "dtype": "float16", "batch": 2},
    {"key": "tq3:center=tile", "value": "tcq2:center=mean", "key_dim": 64, "value_dim": 64},
    {"counts": (), "batch": 2},
]


@pytest.mark.parametrize("options", CACHES)
def test_opcheck_pages(options: dict[str, Any]) -> None:
    cache = make_cache(**options)
    strided = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (cache.keys, cache.values))
    opcheck(OPS.encode_pages.default, (cache.table, cache.keys, cache.values, 0, cache.layout))
    opcheck(OPS.encode_pages.default, (cache.table, *strided, 0, cache.layout))
    for side in (0, 1):
        opcheck(OPS.decode_pages.default, (cache.table, cache.counts, side, cache.layout, torch.float16))


@pytest.mark.parametrize("options", CACHES)
def test_opcheck_attend(options: dict[str, Any]) -> None:
    cache = make_cache(**options)
    dtype = options.get("dtype", "float32")
    batch = cache.table.shape[0]
    opcheck(OPS.attend.default, tuple(Case(cache, dtype=dtype).arguments()))
    case = Case(cache, sinks=4, exact=9, queries=3, dtype=dtype, causal=True, softcap=3.0)
    case.options["rows"] = rows(*[(2, 1)] * batch)
    case.options["mask"] = torch.ones(1, 1, 3, case.positions, dtype=torch.bool)
    case.options["sink_logits"] = torch.ones(4)
    opcheck(OPS.attend.default, (*case.arguments(), 1e-3, 9))
    out = torch.empty((*case.query.shape[:3], cache.layout[3]), dtype=case.query.dtype)
    opcheck(OPS.attend_counting.default, (*case.arguments(), 1e-3, -1, out, torch.zeros(2, dtype=torch.int64)))


def test_opcheck_append() -> None:
    buffers, new = (
        (torch.randn(1, 2, 9, 64), torch.randn(1, 2, 9, 80)),
        (torch.randn(1, 2, 2, 64), torch.randn(1, 2, 2, 80)),
    )
    opcheck(OPS.append.default, (*buffers, *new, 3))


def test_fakes_give_the_shapes_and_strides_of_the_operators() -> None:
    cache = make_cache(batch=2, key_dim=128, value_dim=64)
    case = Case(cache, exact=5, queries=3)
    case.query = case.query.transpose(1, 2).contiguous().transpose(1, 2)
    x = torch.randn(2, 70, 64).transpose(0, 1).contiguous().transpose(0, 1)
    centred = code("tq4:center=tile")
    calls: list[tuple[Any, tuple[Any, ...]]] = [
        (OPS.encode, (x, centred, 1)),
        (OPS.decode, (*ops.encode(x, centred, 1), centred, 1, 70, 64, torch.float16)),
        (OPS.rotate, (x, True)),
        (OPS.attend, tuple(case.arguments())),
    ]
    for operator, arguments in calls:
        real = operator(*arguments)
        with FakeTensorMode() as mode:
            fake = operator(*[mode.from_tensor(a) if isinstance(a, Tensor) else a for a in arguments])
        pairs = zip(fake, real, strict=True) if isinstance(real, tuple) else [(fake, real)]
        for a, b in pairs:
            assert (a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype)


def compiled(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, backend="aot_eager", **options)


@pytest.mark.parametrize("center", ["none", "mean", "tile"])
def test_compile_encode_decode_rotate(center: str) -> None:
    centred = code(f"tq4:center={center}")

    def function(x: Tensor) -> tuple[Tensor, ...]:
        data, means = ops.encode(x * 2, centred, 0)
        dense = ops.decode(data, means, centred, 0, x.shape[-2], x.shape[-1], x.dtype)
        return data, means, dense + 1, ops.rotate(x)

    fast = compiled(function)
    for tokens in (64, 70, 200):  # the second call makes the number of tokens symbolic
        x = torch.randn(2, tokens, 128)
        for a, b in zip(fast(x), function(x), strict=True):
            assert torch.equal(a, b)


def test_compile_pages_orders_reads_after_writes() -> None:
    layout = ops.layout(code("tq4"), 64, code("tq3"), 64, 2)
    counts = torch.tensor([64], dtype=torch.int32)

    def function(table: Tensor, x: Tensor, query: Tensor) -> tuple[Tensor, Tensor]:
        ops.encode_pages(table, x, x, 0, layout)
        first = ops.attend(query, table, counts, None, None, None, None, None, None, None, layout, scale=0.125)
        ops.encode_pages(table, x + 1, x - 1, 0, layout)
        second = ops.attend(query, table, counts, None, None, None, None, None, None, None, layout, scale=0.125)
        return first, second

    fast = compiled(function)
    for tokens in (64,):
        page, other = new_page(layout), new_page(layout)
        x, query = torch.randn(1, 2, tokens, 64), torch.randn(1, 4, 3, 64)
        want = function(torch.tensor([[page.data_ptr()]]), x, query)
        got = fast(torch.tensor([[other.data_ptr()]]), x, query)
        assert torch.equal(page, other)
        assert not torch.equal(want[0], want[1])
        for a, b in zip(got, want, strict=True):
            assert torch.equal(a, b)


def test_compile_decode_pages() -> None:
    cache = make_cache(counts=(64, 20))

    def function(table: Tensor, counts: Tensor) -> Tensor:
        return ops.decode_pages(table, counts, 0, cache.layout, torch.float32) * 2

    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        fast = compiled(function)
        for n in (2, 1):
            counts = cache.counts[:n].clone()
            assert torch.equal(fast(cache.table, counts), function(cache.table, counts))


def test_compile_attend_over_growing_exact_tokens() -> None:
    cache = make_cache(batch=2)

    def function(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        return ops.attend(
            query * 1.0, cache.table, cache.counts, None, None, keys, values, None, None, None, cache.layout,
            0.1, causal=True,
        ).transpose(1, 2)  # fmt: skip

    fast = compiled(function)
    for exact in range(5, 9):
        case = Case(cache, exact=exact)
        assert case.exact is not None
        assert torch.equal(fast(case.query, *case.exact), function(case.query, *case.exact))


@pytest.mark.parametrize("name", reference.names())
def test_compile_encode_of_every_codec(name: str) -> None:
    x = torch.randn(1, 64, 64)
    for a, b in zip(compiled(ops.encode)(x, code(name), 1), ops.encode(x, code(name), 1), strict=True):
        assert torch.equal(a, b)
