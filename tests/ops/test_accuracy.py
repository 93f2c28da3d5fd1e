"""What the integer kernels cost: outputs of attend against float64 attention over the *decoded* cache.

Per query head, the error is |out - want| / |want|. Whatever quantization did is in both; what is measured is the int8
query, the rounding of probabilities, and values that stay unread.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kvpack import ops, reference

from .helpers import code, new_page

pytestmark = pytest.mark.skipif(not ops.native, reason="the defaults are float32 throughout")

DATA = Path(os.environ["KVPACK_DATA"])
MOMENTS = DATA / "kv_stats" / "llama-3.1-8b.second-moments.json"
D, GROUP = 128, 4
FULL = pytest.mark.full
CODECS = [name for name in reference.CODECS if name != "exact"]
MEDIAN, WORST, HIGH = 1.5e-2, 3e-2, 2e-4  # tests/cpp/attend_case.h has the same


def errors(codec: str, query: Tensor, keys: Tensor, values: Tensor, **how: Any) -> Tensor:
    """Errors float64 [Hq] of one query token. query: [Hq, d], times 1/sqrt(d); keys, values: [H, tokens, d]."""
    heads, tokens, d = keys.shape
    layout = ops.layout(code(codec), d, code(codec), d, heads)
    pages = [new_page(layout) for _ in range(tokens // 256)]
    table = torch.tensor([[page.data_ptr() for page in pages]])
    counts = torch.full((tokens // 64,), 64, dtype=torch.int32)
    ops.encode_pages(table, keys[None], values[None], 0, layout)
    k, v = (ops.decode_pages(table, counts, side, layout, torch.float32)[0].double() for side in (0, 1))
    nothing = [None] * 7
    got = ops.attend(query[None, :, None], table, counts, *nothing, layout, d**-0.5, **how)[0, :, 0].double()
    grouped = query.double().reshape(heads, -1, d)
    want = (torch.softmax(grouped @ k.transpose(-1, -2) * d**-0.5, -1) @ v).reshape(got.shape)
    return (got - want).norm(dim=-1) / want.norm(dim=-1)


def gaussian(heads: int, tokens: int, sigma: float, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Queries whose scores have a standard deviation of sigma, keys, values."""
    generator = torch.Generator().manual_seed(seed)
    keys, values = (torch.randn(heads, tokens, D, generator=generator) for _ in range(2))
    return sigma * torch.randn(heads * GROUP, D, generator=generator), keys, values


def spiky(heads: int, tokens: int, spike: float) -> tuple[Tensor, Tensor, Tensor]:
    """One token in 64 stands out by `spike` nats; the others' small probabilities add up to one direction."""
    generator = torch.Generator().manual_seed(7)
    normal = lambda *size: torch.randn(*size, generator=generator)  # noqa: E731
    q, keys, values = normal(heads, 1, D), normal(heads, tokens, D), 0.5 * normal(heads, tokens, D)
    stands_out = torch.arange(tokens) % 64 == 17
    wanted = torch.where(stands_out, torch.tensor(spike), 0.3 * normal(heads, tokens)) * D**0.5
    keys += ((wanted - (keys * q).sum(-1)) / (q * q).sum(-1))[..., None] * q
    values += torch.where(stands_out[:, None], normal(heads, 1, D), normal(heads, 1, D))
    return (q + 0.05 * normal(heads, GROUP, D)).reshape(-1, D), keys, values


def measured(sigma: float) -> tuple[Tensor, Tensor, Tensor]:
    """Keys and values with measured second moments of channels; queries whose channels are shaped as the keys'."""
    if not MOMENTS.exists():
        pytest.skip("no measured second moments: kv_stats is not below $KVPACK_DATA")
    stored = json.loads(MOMENTS.read_text())
    layers = [stored[name] for name in sorted(name for name in stored if name.startswith("layer_"))[::8]]
    shape = {
        letter: torch.tensor([head for layer in layers for head in layer[letter].values()]).sqrt().float()
        for letter in "KV"
    }
    heads = len(shape["K"])
    query, keys, values = gaussian(heads, 1024, 1.0, seed=3)
    keys, values = keys * shape["K"][:, None], values * shape["V"][:, None]
    query = (query.reshape(heads, GROUP, D) * shape["K"][:, None]).reshape(-1, D)
    scores = (query.reshape(heads, GROUP, D) @ keys.transpose(-1, -2) * D**-0.5).std(-1)
    return query * sigma / scores.reshape(-1, 1), keys, values


def check(found: Tensor, precision: int) -> None:
    if precision == 1:
        assert float(found.max()) < HIGH
    else:
        assert float(found.median()) < MEDIAN
        assert float(found.max()) < WORST


@pytest.mark.parametrize("precision", [0, 1])
@pytest.mark.parametrize("sigma", [pytest.param(0.3, marks=FULL), 1.0, pytest.param(2.0, marks=FULL), 4.0])
@pytest.mark.parametrize("codec", CODECS)
def test_gaussian(codec: str, sigma: float, precision: int) -> None:
    check(errors(codec, *gaussian(4, 2048, sigma), precision=precision), precision)


@pytest.mark.parametrize("precision", [0, 1])
@pytest.mark.parametrize("spike", [5.0, 6.4])
@pytest.mark.parametrize("codec", CODECS)
def test_spiky(codec: str, spike: float, precision: int) -> None:
    check(errors(codec, *spiky(2, 2048, spike), precision=precision), precision)


@pytest.mark.parametrize("precision", [0, 1])
@pytest.mark.parametrize("sigma", [1.0, 4.0])
@pytest.mark.parametrize("codec", CODECS)
def test_measured_channels(codec: str, sigma: float, precision: int) -> None:
    check(errors(codec, *measured(sigma), precision=precision), precision)


@pytest.mark.parametrize("codec", ["tq4", "tcq2", "q8_0", "kivi4"])
@pytest.mark.parametrize("share", [2.5e-4])
def test_unread_values(codec: str, share: float) -> None:
    """The share bounds the probability that is missing, and here the error: values are no larger than outputs."""
    for data in (gaussian(4, 4096, 4.0), gaussian(4, 4096, 16.0), spiky(2, 4096, 6.4), measured(4.0)):
        sparse = errors(codec, *data, precision=1, sparse_values=share)
        assert float(sparse.max()) < HIGH + 1e-3
