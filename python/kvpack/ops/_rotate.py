"""Operator ``kvpack::rotate``: the randomized Hadamard rotation and its inverse."""

from __future__ import annotations

import torch
from torch import Tensor

from ..reference import rotate
from . import _library, _tables

SCHEMA = "rotate(Tensor x, bool inverse) -> Tensor"


def _check(x: Tensor) -> None:
    if x.dim() < 1:
        raise ValueError("x has 0 dims; it needs at least 1: [..., d]")
    _tables.check_dtype(x.dtype, "x")
    _tables.check_head_dim(x.shape[-1])


def fake(x: Tensor, inverse: bool) -> Tensor:
    _check(x)
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def default(x: Tensor, inverse: bool) -> Tensor:
    _check(x)
    rotated = torch.from_numpy(rotate(x.detach().to("cpu", torch.float64).numpy(), inverse))
    return rotated.to(x.device, x.dtype).contiguous()


OP = _library.register(SCHEMA, fake, default)
