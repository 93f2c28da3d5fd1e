"""Bad arguments raise ValueError in the defaults (which name the value), the native kernels, the fakes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from kvpack import ops

from .helpers import Case, Implementation, code, make_cache, refuses, rows

TQ4, EXACT = code("tq4"), code("exact")
NONE = torch.zeros(0, 66, dtype=torch.uint8)  # no means


@pytest.mark.parametrize(
    ("bad", "named"),
    [
        (99, "99"),
        (-1, "-1|255"),
        (TQ4 | 7 << 8, "7"),
        (code("q8_0") | 1 << 8, "1"),
        (TQ4 | 1 << 16, "1"),
        (EXACT | 3 << 16, "3"),
        (TQ4 | 3 << 24, "center 3"),
        (code("q5_0") | 1 << 24, "center 1"),
        (EXACT | 2 << 24, "center 2"),
        (code("rq8_0") | 1 << 28, "search 1"),
        (EXACT | 1 << 28, "search 1"),
        (TQ4 | 1 << 29, "28th"),
    ],
)
def test_codec_codes(impl: Implementation, bad: int, named: str) -> None:
    x = torch.zeros(64, 64)
    with refuses(impl, named):
        impl.encode(x, bad, 0)
    with refuses(impl, named):
        impl.decode(torch.zeros(1, 4224, dtype=torch.uint8), NONE, bad, 0, 64, 64, torch.float32)
    with pytest.raises(ValueError, match=named):
        ops.layout(bad, 64, TQ4, 64, 1)
    with pytest.raises(ValueError, match=named):
        ops.side_bytes(bad, 64, 0)


def test_encode(impl: Implementation) -> None:
    with refuses(impl, r"88.*64, 80, 96, 112, 128, 160, 192, 256 .2.a times 1, 12, 20 or 28"):
        impl.encode(torch.zeros(64, 88), TQ4, 0)
    with refuses(impl, "2"):
        impl.encode(torch.zeros(64, 64), TQ4, 2)
    with refuses(impl, "1"):
        impl.encode(torch.zeros(64), TQ4, 0)
    with refuses(impl):
        impl.encode(torch.zeros(64, 64, dtype=torch.float64), TQ4, 0)
    with refuses(impl):
        impl.encode(torch.zeros(64, 64, dtype=torch.float16), EXACT, 0)


def test_decode(impl: Implementation) -> None:
    data, none = impl.encode(torch.zeros(70, 64), TQ4, 0)
    for tokens in (-1, 64, 129):
        with pytest.raises(ValueError, match=str(tokens)):
            impl.decode(data, none, TQ4, 0, tokens, 64, torch.float32)
    with refuses(impl, str(data.shape[-1])):
        impl.decode(data, none, TQ4, 0, 70, 128, torch.float32)
    with refuses(impl, "72"):
        impl.decode(data, none, TQ4, 0, 70, 72, torch.float32)
    with refuses(impl):
        impl.decode(data, none, TQ4, 0, 70, 64, torch.int32)
    with refuses(impl):
        impl.decode(data.to(torch.int16), none, TQ4, 0, 70, 64, torch.float32)
    with refuses(impl):
        impl.decode(data[0], none, TQ4, 0, 64, 64, torch.float32)
    centred = code("tq4:center=tile")
    data, means = impl.encode(torch.zeros(70, 64), centred, 0)
    for bad in (means[:1], means[:, :-1], means.to(torch.int8), none):
        with refuses(impl, "means"):
            impl.decode(data, bad, centred, 0, 70, 64, torch.float32)
    with refuses(impl, "means"):
        impl.decode(data, means, TQ4, 0, 70, 64, torch.float32)


def test_rotate(impl: Implementation) -> None:
    with refuses(impl, r"48.*64, 80, .* 256"):
        impl.rotate(torch.zeros(3, 48), False)
    with refuses(impl):
        impl.rotate(torch.zeros(3, 64, dtype=torch.int32), False)
    with refuses(impl):
        impl.rotate(torch.tensor(1.0), False)


def test_layout() -> None:
    with pytest.raises(ValueError, match="0 KV heads"):
        ops.layout(TQ4, 64, TQ4, 64, 0)
    with pytest.raises(ValueError, match="72"):
        ops.layout(TQ4, 64, TQ4, 72, 1)
    with pytest.raises(ValueError, match="4 entries"):
        ops.page_bytes([TQ4, 64, TQ4, 64])


def replaced(**changes: Any) -> Callable[[list[Any]], list[Any]]:
    """A change of the arguments of a call, by their names."""

    def change(arguments: list[Any]) -> list[Any]:
        names = ops.attend.__code__.co_varnames[: len(arguments)]
        named = dict(zip(names, arguments, strict=True))
        for name, value in changes.items():
            named[name] = value(named[name]) if callable(value) else value
        return list(named.values())

    return change


def dense(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


# What the values decide (counts, rows, the mask's length) no fake can know.
ATTEND_SHAPES = {
    "query dims": (replaced(query=lambda q: q[0]), "3"),
    "query dtype": (replaced(query=lambda q: q.double()), "."),
    "query head size": (replaced(query=dense(2, 4, 3, 64)), "64"),
    "query heads": (replaced(query=dense(2, 3, 3, 128)), "3"),
    "query rows": (replaced(query=dense(3, 4, 3, 128)), "."),
    "table dtype": (replaced(table=lambda t: t.int()), "."),
    "table dims": (replaced(table=lambda t: t[0]), "."),
    "counts dtype": (replaced(counts=lambda c: c.long()), "."),
    "too many counts": (replaced(counts=torch.full((5,), 64, dtype=torch.int32)), "5"),
    "one of a pair": (replaced(keys=None), "."),
    "one of the sinks": (replaced(sink_values=None), "."),
    "tokens of keys and values": (replaced(keys=dense(2, 2, 8, 128)), "8"),
    "KV heads": (replaced(values=dense(2, 3, 9, 64)), "3"),
    "head size of values": (replaced(values=dense(2, 2, 9, 128)), "128"),
    "dtype of keys": (replaced(keys=dense(2, 2, 9, 128, dtype=torch.float16)), "."),
    "rows dtype": (replaced(rows=torch.zeros(2, 2)), "."),
    "rows shape": (replaced(rows=rows((0, 0))), "1"),
    "mask dtype": (replaced(mask=torch.ones(1, 1, 1, 141, dtype=torch.int32)), "."),
    "mask dims": (replaced(mask=torch.ones(141)), "1"),
    "mask heads": (replaced(mask=torch.ones(1, 2, 1, 141)), "2"),
    "sink logits": (replaced(sink_logits=torch.ones(2)), "2"),
    "sink logits dtype": (replaced(sink_logits=torch.ones(4).half()), "."),
    "softcap": (replaced(softcap=-1.0), "-1"),
    "precision": (replaced(precision=2), "2"),
    "layout": (replaced(layout=[TQ4, 128, 77, 64, 2]), "77"),
}
ATTEND_VALUES = {
    "count below 0": (replaced(counts=torch.tensor([64, -1], dtype=torch.int32)), "-1"),
    "count above 64": (replaced(counts=torch.tensor([65, 64], dtype=torch.int32)), "65"),
    "pad": (replaced(rows=rows((0, 0), (-2, 0))), "-2"),
    "sink start": (replaced(rows=rows((0, 0), (0, 138))), "138"),
    "mask positions": (replaced(mask=torch.ones(1, 1, 1, 140)), "140"),
    "null page": (replaced(table=lambda t: t * 0), "0"),
    "misaligned page": (replaced(table=lambda t: t + 4), "."),
}


@pytest.mark.parametrize("exact", [-2, 10])
def test_attend_refuses_more_exact_tokens_than_there_are(impl: Implementation, exact: int) -> None:
    with refuses(impl, str(exact)):
        impl.attend(*attend_case().arguments(), 0.0, exact)


def attend_case() -> Case:
    cache = make_cache(key_dim=128, value_dim=64, batch=2, heads=2)
    case = Case(cache, sinks=4, exact=9, queries=3)
    assert case.positions == 141
    return case


@pytest.mark.parametrize("what", [*ATTEND_SHAPES, *ATTEND_VALUES])
def test_attend(impl: Implementation, what: str) -> None:
    change, named = {**ATTEND_SHAPES, **ATTEND_VALUES}[what]
    case = attend_case()
    with refuses(impl, named):
        impl.attend(*change(case.arguments()))


@pytest.mark.parametrize("what", ATTEND_SHAPES)
def test_fake_of_attend(what: str) -> None:
    change, named = ATTEND_SHAPES[what]
    arguments = change(attend_case().arguments())
    with FakeTensorMode() as mode, pytest.raises(ValueError, match=named):
        torch.ops.kvpack.attend(*[mode.from_tensor(a) if isinstance(a, Tensor) else a for a in arguments])


COUNTING: dict[str, tuple[Callable[[Tensor, Tensor], tuple[float, Tensor, Tensor]], str]] = {
    "share below 0": (lambda out, unread: (-0.1, out, unread), "-0.1"),
    "share of everything": (lambda out, unread: (1.0, out, unread), "1.0"),
    "share that is no number": (lambda out, unread: (float("nan"), out, unread), "nan"),
    "shape of out": (lambda out, unread: (0.0, out[:1], unread), r"\[1, "),
    "dtype of out": (lambda out, unread: (0.0, out.half(), unread), "float16"),
    "order of out": (lambda out, unread: (0.0, out.transpose(0, 1).contiguous().transpose(0, 1), unread), "contiguous"),
    "dtype of unread": (lambda out, unread: (0.0, out, unread.int()), "int32"),
    "shape of unread": (lambda out, unread: (0.0, out, unread[:1]), r"\[1\]"),
}


@pytest.mark.parametrize("what", COUNTING)
def test_attend_counting(impl: Implementation, what: str) -> None:
    change, named = COUNTING[what]
    case = attend_case()
    share, *written = change(torch.zeros(2, 4, 3, 64), torch.zeros(2, dtype=torch.int64))
    more = (share, -1, *written)
    with refuses(impl, named):
        impl.attend_counting(*case.arguments(), *more)
    with FakeTensorMode() as mode, pytest.raises(ValueError, match=named):
        torch.ops.kvpack.attend_counting(
            *[mode.from_tensor(a) if isinstance(a, Tensor) else a for a in (*case.arguments(), *more)]
        )


PAGES: dict[str, tuple[Callable[..., tuple[Any, ...]], str]] = {
    "first tile": (lambda t, k, v: (t, k, v, -1), "-1"),
    "too many tiles": (lambda t, k, v: (t, k, v, 3), "3"),
    "part of a tile": (lambda t, k, v: (t, k[:, :, :100], v[:, :, :100], 0), "100"),
    "tokens differ": (lambda t, k, v: (t, k, v[:, :, :64], 0), "64"),
    "dtypes differ": (lambda t, k, v: (t, k, v.half(), 0), "."),
    "dtype": (lambda t, k, v: (t, k.double(), v.double(), 0), "."),
    "rows": (lambda t, k, v: (t, k[:1], v[:1], 0), "1"),
    "KV heads": (lambda t, k, v: (t, k[:, :1], v[:, :1], 0), "1"),
    "head size": (lambda t, k, v: (t, v, v, 0), "64"),
    "dims": (lambda t, k, v: (t, k[0], v[0], 0), "3"),
    "table": (lambda t, k, v: (t.int(), k, v, 0), "."),
}


@pytest.mark.parametrize("what", PAGES)
def test_encode_pages(impl: Implementation, what: str) -> None:
    change, named = PAGES[what]
    cache = make_cache(key_dim=128, value_dim=64, batch=2, heads=2)
    before = [page.clone() for page in cache.memory]
    arguments = change(cache.table, cache.keys + 1, cache.values + 1)
    with refuses(impl, named):
        impl.encode_pages(*arguments, cache.layout)
    for page, old in zip(cache.memory, before, strict=True):
        assert torch.equal(page, old)
    with FakeTensorMode() as mode, pytest.raises(ValueError, match=named):
        torch.ops.kvpack.encode_pages(
            *[mode.from_tensor(a) if isinstance(a, Tensor) else a for a in arguments], cache.layout
        )


def test_encode_pages_of_exact_needs_its_dtype(impl: Implementation) -> None:
    cache = make_cache("exact", "tq4", dtype="float16")
    with refuses(impl):
        impl.encode_pages(cache.table, cache.keys.float(), cache.values.float(), 0, cache.layout)


def test_decode_pages(impl: Implementation) -> None:
    cache = make_cache(batch=2)
    good = (cache.table, cache.counts, 0, cache.layout, torch.float32)

    def change(index: int, value: Any) -> list[Any]:
        return [*good[:index], value, *good[index + 1 :]]

    for arguments, named in (
        (change(0, cache.table[0]), "."),
        (change(0, cache.table.int()), "."),
        (change(1, cache.counts.long()), "."),
        (change(1, torch.full((5,), 64, dtype=torch.int32)), "5"),
        (change(1, torch.tensor([65], dtype=torch.int32)), "65"),
        (change(2, 2), "2"),
        (change(3, [TQ4, 128, TQ4, 100, 2]), "100"),
        (change(3, [TQ4, 128, TQ4]), "3"),
        (change(4, torch.int32), "."),
    ):
        with refuses(impl, named):
            impl.decode_pages(*arguments)


def test_append(impl: Implementation) -> None:
    keys, values = torch.randn(2, 3, 10, 64), torch.randn(2, 3, 10, 80)
    want = keys.clone(), values.clone()
    new = torch.randn(2, 2, 3, 64).transpose(1, 2), torch.randn(2, 3, 80, 2).transpose(2, 3)  # any strides
    impl.append(keys, values, *new, 7)
    for got, before, tokens in zip((keys, values), want, new, strict=True):
        assert torch.equal(got[:, :, 7:9], tokens)
        assert torch.equal(got[:, :, :7], before[:, :, :7])
        assert torch.equal(got[:, :, 9:], before[:, :, 9:])
    impl.append(keys, values, new[0][:, :, :0], new[1][:, :, :0], 10)
    for arguments, named in (
        ((keys, values, *new, 9), "9..10"),
        ((keys, values, *new, -1), "-1"),
        ((keys, values, new[0].half(), new[1], 0), "float16"),
        ((keys, values, new[0][:1], new[1], 0), r"\[1, "),
        ((keys, values, new[0], new[1][..., :64], 0), "64"),
        ((keys, values, new[0][:, :, :1], new[1], 0), "1 and 2"),
        ((keys[0], values, *new, 0), "3"),
        ((keys, values, new[0], new[1][0], 0), "3"),
    ):
        with refuses(impl, named):
            impl.append(*arguments)
