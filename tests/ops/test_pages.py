"""encode_pages and decode_pages against the reference."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kvpack import ops, reference

from .helpers import (
    DEFAULT,
    DTYPES,
    Implementation,
    code,
    expected,
    make_cache,
    named,
    new_page,
    reference_bytes,
    refuses,
    slow,
)

PAIRS = [("tq4", "tq3"), ("q8_0", "tq2"), ("exact", "q4_0"), ("tq3", "exact"), ("tq4", "tq4")]
EVERY = [*((name, "tq4") for name in reference.CODECS), *(("tq4", name) for name in reference.CODECS)]
CENTRED = [
    ("tq4:center=tile", "tq3:center=mean"),
    ("tq1:center=mean", "rq8_0:center=tile"),
    ("tcq3:center=mean", "q5_0"),
    ("q8_0", "tqr3:center=mean,search"),
    ("rq4_0:center=tile", "tcq2:center=tile"),
    ("tq2.5:center=tile", "tq3.5:center=mean"),
    ("tq3.5", "tq2.5:center=tile"),
]


def check_bytes(impl: Implementation, key: str, value: str, dtype: str, counts: tuple[int, ...]) -> None:
    """Every byte of the pages: what the reference says, and where it says nothing, what was there."""
    cache = make_cache(
        key, value, key_dim=128, value_dim=64, batch=2, counts=counts, dtype=dtype, encode=impl.encode_pages, shift=3.0
    )
    key_data, key_means = reference_bytes(cache.keys, key, "key")
    value_data, value_means = reference_bytes(cache.values, value, "value")
    sizes = (
        reference.sections(named(key)["name"], 128, "key", dtype),
        reference.sections(named(value)["name"], 64, "value", dtype),
    )
    records = reference.join_record(key_data, value_data, *sizes)
    pages = cache.table.shape[1]
    for row in range(2):
        means = [(named(key)["center"], key_means[row]), (named(value)["center"], value_means[row])]
        maps = (reference.map_bytes(named(key)["name"], 128), reference.map_bytes(named(value)["name"], 64))
        want = reference.join_pages(records[row], reference.join_means(pages, means, maps))
        ones = [(center, np.ones_like(mean)) for center, mean in means]
        written = reference.join_pages(np.ones_like(records[row]), reference.join_means(pages, ones, maps))
        got = np.stack([cache.page(row, page).numpy() for page in range(pages)])
        np.testing.assert_array_equal(got, np.where(written, want, 0xA5))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("key", "value"), PAIRS)
def test_pages_hold_the_bytes_of_the_reference(impl: Implementation, key: str, value: str, dtype: str) -> None:
    check_bytes(impl, key, value, dtype, (64,) * 6)


@pytest.mark.parametrize(("key", "value"), [*EVERY, *CENTRED])
def test_pages_of_every_codec(impl: Implementation, key: str, value: str) -> None:
    check_bytes(impl, key, value, "float32", (64,) * (2 if slow(key) or slow(value) else 5))


@pytest.mark.parametrize(("key", "value"), CENTRED)
def test_pages_in_several_calls(impl: Implementation, key: str, value: str) -> None:
    """The mean of a row is frozen by its first tile with a token, whichever call brings it; of one head here late."""
    whole = make_cache(key, value, key_dim=64, value_dim=64, counts=(64,) * 9, batch=2, encode=lambda *_: None, shift=3)
    parts = make_cache(key, value, key_dim=64, value_dim=64, counts=(64,) * 9, batch=2, encode=lambda *_: None, shift=3)
    for x in (whole.keys, whole.values):
        x[1, 0, : 4 * 64] = 0.0  # all of the first page
    impl.encode_pages(whole.table, whole.keys, whole.values, 0, whole.layout)
    for first, last in ((0, 1), (1, 3), (3, 6), (6, 9)):
        keys, values = (x[:, :, 64 * first : 64 * last] for x in (whole.keys, whole.values))
        impl.encode_pages(parts.table, keys, values, first, parts.layout)
    for a, b in zip(whole.memory, parts.memory, strict=True):
        assert torch.equal(a, b)
    for side, (text, x) in enumerate(((key, whole.keys), (value, whole.values))):
        got = impl.decode_pages(parts.table, parts.counts, side, parts.layout, torch.float32)
        want = torch.from_numpy(expected(x, text, ("key", "value")[side]))
        torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=4e-6)
        assert not got[1, 0, : 4 * 64].any()


def test_a_mean_that_is_frozen_within_a_page(impl: Implementation) -> None:
    """Tiles of zeros before it, of a call of their own: padding, which nothing reads. What follows is right."""
    text = "tq4:center=mean"
    cache = make_cache(text, text, key_dim=64, value_dim=64, counts=(64,) * 6, encode=lambda *_: None, shift=3)
    cache.keys[:, :, :64] = 0.0
    for first, last in ((0, 1), (1, 2), (2, 6)):
        keys, values = (x[:, :, 64 * first : 64 * last] for x in (cache.keys, cache.values))
        impl.encode_pages(cache.table, keys, values, first, cache.layout)
    got = impl.decode_pages(cache.table, cache.counts, 0, cache.layout, torch.float32)[:, :, 64:]
    plain = torch.from_numpy(expected(cache.keys[:, :, 64:], text, "key"))  # the first tile with tokens comes first
    torch.testing.assert_close(got.double(), plain, rtol=1e-6, atol=4e-6)


def test_first_tile_and_strides(impl: Implementation) -> None:
    whole = make_cache(counts=(64,) * 7, batch=2)
    parts = make_cache(counts=(64,) * 7, batch=2, encode=lambda *_: None)
    for first, last in ((0, 1), (1, 6), (6, 7)):
        axes = (1, 2) if first else (2, 3)
        keys, values = (
            x[:, :, 64 * first : 64 * last].transpose(*axes).contiguous().transpose(*axes)
            for x in (whole.keys, whole.values)
        )
        impl.encode_pages(parts.table, keys, values, first, parts.layout)
    for a, b in zip(whole.memory, parts.memory, strict=True):
        assert torch.equal(a, b)


def test_no_tiles_write_nothing(impl: Implementation) -> None:
    cache = make_cache(counts=(64,) * 4)
    before = cache.page(0, 0).clone()
    impl.encode_pages(cache.table, cache.keys[:, :, :0], cache.values[:, :, :0], 4, cache.layout)
    assert torch.equal(cache.page(0, 0), before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("key", "value"), [*PAIRS, *CENTRED])
def test_decode_pages(impl: Implementation, key: str, value: str, dtype: str) -> None:
    cache = make_cache(key, value, key_dim=64, value_dim=128, batch=2, counts=(64, 10, 64, 64, 1, 33), dtype=dtype)
    assert cache.packed is not None
    for side in (0, 1):
        for target in DTYPES.values():
            got = impl.decode_pages(cache.table, cache.counts, side, cache.layout, target)
            assert got.dtype == target
            assert got.is_contiguous()
            want = torch.from_numpy(cache.packed[side])
            torch.testing.assert_close(got.double(), want, rtol=2 * torch.finfo(target).eps, atol=2e-6)


def test_decode_pages_of_nothing(impl: Implementation) -> None:
    cache = make_cache(counts=(), batch=3, spare_pages=0, heads=2)
    assert cache.table.shape == (3, 0)
    got = impl.decode_pages(cache.table, cache.counts, 0, cache.layout, torch.float16)
    assert got.shape == (3, 2, 0, 128)
    spare = make_cache(counts=(), spare_pages=1)
    assert impl.decode_pages(spare.table, spare.counts, 1, spare.layout, torch.float32).shape == (
        1,
        2,
        0,
        128,
    )


def test_rows_may_share_pages(impl: Implementation) -> None:
    cache = make_cache(counts=(64, 64), batch=1)
    shared = cache.table.repeat(3, 1)
    got = impl.decode_pages(shared, cache.counts, 0, cache.layout, torch.float32)
    one = impl.decode_pages(cache.table, cache.counts, 0, cache.layout, torch.float32)
    assert torch.equal(got, one.expand(3, -1, -1, -1))


@pytest.mark.parametrize("address", [0, 8])
def test_bad_addresses(impl: Implementation, address: int) -> None:
    cache = make_cache(counts=(64,) * 5, batch=2)
    table = cache.table.clone()
    table[1, 1] = address
    pages = [page.clone() for page in cache.memory]
    with refuses(impl, str(address)):
        impl.encode_pages(table, cache.keys + 1, cache.values, 0, cache.layout)
    with refuses(impl, str(address)):
        impl.decode_pages(table, cache.counts, 0, cache.layout, torch.float32)
    for page, before in zip(cache.memory, pages, strict=True):
        assert torch.equal(page, before)  # all addresses are checked before the first write
    # A page that no tile needs is not looked at.
    impl.decode_pages(table, cache.counts[:4], 0, cache.layout, torch.float32)


def test_bad_token_is_named(impl: Implementation) -> None:
    cache = make_cache(counts=(64, 64))
    values = cache.values.clone()
    values[0, 1, 100, 3] = float("nan")
    with pytest.raises(ValueError, match=r"value.*100"):
        impl.encode_pages(cache.table, cache.keys, values, 0, cache.layout)


def test_public_functions() -> None:
    layout = ops.layout(code("tq4"), 64, code("tq4"), 64, 1)
    page = new_page(layout)
    table = torch.tensor([[page.data_ptr()]])
    x = torch.randn(1, 1, 64, 64, generator=torch.Generator().manual_seed(5))
    ops.encode_pages(table, x, x, 0, layout)
    counts = torch.tensor([64], dtype=torch.int32)
    got = ops.decode_pages(table, counts, 0, layout, torch.float32)
    want = DEFAULT.decode(*DEFAULT.encode(x, code("tq4"), 0), code("tq4"), 0, 64, 64, torch.float32)
    torch.testing.assert_close(got, want)
