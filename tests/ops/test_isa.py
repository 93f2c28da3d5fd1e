"""`kvpack.isa.use` pins NumPy codecs and operators alike, and every level gives the same codes."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch

import kvpack
from kvpack import isa, ops, spec


@pytest.fixture(autouse=True)
def _back() -> Iterator[None]:
    before = isa.active()
    yield
    isa.use(before)


@pytest.mark.parametrize("level", isa.available())
@pytest.mark.parametrize("text", [*kvpack.codecs(), "tq3:center=tile", "tcq2:center=mean,search"])
def test_levels_agree(level: str, text: str) -> None:
    x = torch.randn(2, 70, 128, generator=torch.Generator().manual_seed(5)) + 0.5
    code = spec.parse(text).code()
    isa.use("scalar")
    expected = ops.encode(x, code, 0)
    query = torch.randn(2, 4, 1, 128, generator=torch.Generator().manual_seed(6))
    slow = _attend(query, x, code)
    isa.use(level)
    assert isa.active() == level
    for got, want in zip(ops.encode(x, code, 0), expected, strict=True):
        assert torch.equal(got, want)
    packed = kvpack.codec(text, 128).encode(x.numpy())
    assert np.array_equal(packed.data, expected[0].numpy())
    assert np.array_equal(packed.means, expected[1].numpy())
    fast = _attend(query, x, code)
    assert (fast - slow).norm() < 2e-2 * slow.norm()
    if ops.native and level != "scalar" and text != "exact":
        assert not torch.equal(fast, slow), "the operators did not change their level"


def _attend(query: torch.Tensor, x: torch.Tensor, code: int) -> torch.Tensor:
    layout = ops.layout(code, 128, code, 128, 1)
    pages = [torch.empty(ops.page_bytes(layout), dtype=torch.uint8) for _ in range(2)]
    table = torch.tensor([[page.data_ptr()] for page in pages])
    tile = x[:, None, :64].contiguous()
    ops.encode_pages(table, tile, tile, 0, layout)
    counts = torch.tensor([64], dtype=torch.int32)
    return ops.attend(query, table, counts, None, None, None, None, None, None, None, layout, 128**-0.5)


def test_an_unknown_level_names_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"'sse9' is not available here; available: scalar"):
        isa.use("sse9")
