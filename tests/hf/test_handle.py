"""Handles behave as the tensor they stand for, and never as something else."""

from __future__ import annotations

import copy
import gc
import weakref
from typing import Any

import numpy as np
import pytest
import torch

from kvpack.hf import Handle

from . import helpers as h
from .test_fused import handles
from .test_window import make


@pytest.fixture
def pair() -> tuple[Any, Any]:
    return handles(h.packed(h.llama()))


def test_metadata_decodes_nothing(pair: tuple[Any, Any]) -> None:
    key, _ = pair
    assert isinstance(key, Handle)
    assert not isinstance(key, torch.Tensor)
    assert key.shape == key.size() == (1, 2, 201, 64)
    assert key.size(2) == key.shape[2] == 201
    assert (key.ndim, key.dim(), len(key), key.numel()) == (4, 4, 1, 2 * 201 * 64)
    assert key.dtype == torch.float32
    assert key.device == torch.device("cpu")
    assert not key.requires_grad
    assert not key.is_cuda
    assert key.is_floating_point()
    assert key.contiguous() is key
    assert key.detach() is key
    assert key.to(torch.float32) is key
    assert key.to("cpu") is key
    assert key.to(device=torch.device("cpu"), dtype=torch.float32, non_blocking=True) is key
    assert "keys of layer 0" in repr(key)
    assert key.call.layer.stats().fallback_calls == {}


@pytest.mark.filterwarnings(h.DECODED)
def test_anything_else_decodes_once(pair: tuple[Any, Any]) -> None:
    key, value = pair
    dense = key.call.dense(0)
    assert torch.equal(key.transpose(1, 2), dense.transpose(1, 2))
    assert torch.equal(torch.matmul(dense, key.mT), dense @ dense.mT)
    assert torch.equal(key + 1, dense + 1)
    assert torch.equal(2 * key, 2 * dense)
    assert torch.equal(key @ key.transpose(2, 3), dense @ dense.transpose(2, 3))
    assert torch.equal(torch.cat([key, key], dim=2), torch.cat([dense, dense], dim=2))
    assert torch.equal(key[:, :, :5], dense[:, :, :5])
    assert torch.equal(key.expand(1, 2, 201, 64), dense)
    assert torch.equal(key.reshape(2, -1), dense.reshape(2, -1))
    assert torch.equal(key.half(), dense.half())
    assert torch.equal(key.to(torch.bfloat16), dense.to(torch.bfloat16))
    assert torch.equal(next(iter(key)), dense[0])
    assert torch.equal(copy.deepcopy(key), dense)
    assert np.array_equal(np.asarray(key), dense.numpy())
    assert torch.equal(key == key, torch.ones_like(dense).bool())
    assert torch.equal(value.T, value.dense().T) if value.ndim == 2 else True
    assert key.transpose(1, 2).data_ptr() == key.dense().data_ptr()
    assert sum(key.call.layer.stats().fallback_calls.values()) == 1  # one call, counted once


def test_it_cannot_be_written(pair: tuple[Any, Any]) -> None:
    key, _ = pair
    one = torch.ones(1)
    for write in (
        lambda: key.add_(1),
        lambda: key.__setitem__(0, 1),
        lambda: torch.Tensor.mul_(key, 2),
        lambda: torch.add(one, one, out=key),
    ):
        with pytest.raises((RuntimeError, TypeError)):
            write()


@pytest.mark.filterwarnings(h.DECODED)
def test_it_is_not_a_truth_value(pair: tuple[Any, Any]) -> None:
    with pytest.raises(RuntimeError, match="ambiguous"):
        bool(pair[0])


@pytest.mark.filterwarnings(h.DECODED)
def test_foreign_code(pair: tuple[Any, Any]) -> None:
    """What goes through torch gets the dense tensor; what takes memory behind its back fails."""
    key = pair[0]
    assert torch.equal(torch.ops.aten.relu(key), torch.relu(key.dense()))
    with pytest.raises((TypeError, AttributeError, RuntimeError)):
        torch.utils.dlpack.from_dlpack(key)


@pytest.mark.filterwarnings(h.DECODED)
def test_handles_of_two_layers_do_not_mix() -> None:
    cache = h.packed(h.llama())
    key, _ = handles(cache)
    other = h.packed(h.llama())
    _, value = handles(other)
    query = torch.randn(1, 2, 1, 64)
    got = torch.nn.functional.scaled_dot_product_attention(query, key, value)
    want = torch.nn.functional.scaled_dot_product_attention(query, key.dense(), value.dense())
    assert torch.equal(got, want)
    assert key.call.layer.stats().fused_calls == 0


def large(least: int) -> list[torch.Tensor]:
    gc.collect()
    return [x for x in gc.get_objects() if type(x) is torch.Tensor and x.numel() >= least]


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("fused", [True, False])
def test_no_dense_copy_outlives_the_call(rows: int, fused: bool) -> None:
    """After a prompt, and after a long chunk, only packed and window tensors are left."""
    model = h.llama()
    dense = rows * 2 * 1000 * 64  # one side of the prompt
    mine = {id(x) for x in large(dense)}
    cache = h.packed(model, key="tq4", fused=fused, window=64)
    ids = h.tokens(rows, 2300)
    with torch.no_grad():
        for part in ids.split([1000, 1200, 100], dim=1):
            model(part, past_key_values=cache)
            left = [x.shape for x in large(dense) if id(x) not in mine]
            assert left == []
    assert cache.get_seq_length() == 2300


def test_the_layer_keeps_no_handle() -> None:
    layer = make(0, 0)
    new = torch.randn(2, 2, 300, 64)
    key, value = layer.update(new, new)
    torch.nn.functional.scaled_dot_product_attention(new, key, value, is_causal=True)
    watch = [weakref.ref(new)]
    del key, value, new
    gc.collect()
    assert [ref() for ref in watch] == [None]
