"""Encode and decode of whole tiles for the defaults: the specification in NumPy, called on tensors.

The defaults exist to be right and to be there on every machine, so they run what the format is defined by.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .. import reference
from ..reference import SIDES
from ._tables import TILE, Codec

_ELEMENTS = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}


def check_finite(x: Tensor, side: int) -> None:
    """ValueError, naming the token, if x [..., tokens, d] has NaN or infinities."""
    finite = torch.isfinite(x)
    if not bool(finite.all()):
        at = (~finite).nonzero()[0].tolist()
        raise ValueError(
            f"NaN or Inf in the {SIDES[side]} of token {at[-2]}: dim {at[-1]} is {float(x[tuple(at)])} "
            "(KVPACK_NONFINITE=zero replaces and counts)"
        )


def _array(x: Tensor) -> NDArray[Any]:
    """A tensor as an array; bfloat16 as the uint16 of its bits."""
    x = x.detach().cpu().contiguous()
    return x.view(torch.int16).numpy().view(np.uint16) if x.dtype == torch.bfloat16 else x.numpy()


def encode_tiles(
    x: Tensor, codec: Codec, side: int, mean: Tensor | None = None, maps: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Bytes [..., tiles, side_bytes] of x [..., tokens, d], and the means and maps that go with them [..., n, entry].

    The last tile is filled with zeros. mean: what goes with them, as returned; maps: only the maps, of each tile; None:
    those of x.
    """
    check_finite(x, side)
    rows = _array(x if codec.exact else x.to(torch.float32))
    means = _means(rows, codec, side, maps) if mean is None else _array(mean)
    data = reference.encode(rows, codec.name, codec.rule or None, SIDES[side], codec.center, codec.search, means)
    return torch.from_numpy(data).to(x.device), torch.from_numpy(means).to(x.device)


def _means(rows: NDArray[Any], codec: Codec, side: int, maps: Tensor | None) -> NDArray[np.uint8]:
    known = None if maps is None else _array(maps)
    return reference.encode_means(rows, codec.name, codec.center, SIDES[side], known)


def means_of(x: Tensor, codec: Codec, side: int, maps: Tensor | None = None) -> Tensor:
    """What goes with the tiles of rows x [..., tokens, d]: uint8 [..., n, entry]; maps as in `encode_tiles`."""
    return torch.from_numpy(_means(_array(x.to(torch.float32)), codec, side, maps))


def maps_of(x: Tensor, codec: Codec, side: int) -> Tensor:
    """The maps of rows x [..., tokens, d]: uint8 [..., n, map]."""
    return torch.from_numpy(reference.maps(_array(x.to(torch.float32)), codec.name, codec.center, SIDES[side]))


def decode_tiles(data: Tensor, means: Tensor, codec: Codec, side: int, head_dim: int) -> Tensor:
    """Vectors [..., tiles, 64, d] of bytes [..., tiles, side_bytes] and their means: float32, exact's own dtype."""
    dtype = _ELEMENTS[codec.dtype]
    x = reference.decode(_array(data), codec.name, SIDES[side], head_dim, dtype=dtype, mean=_array(means))
    with np.errstate(invalid="ignore"):  # signalling NaN
        wide = torch.from_numpy(x.astype(np.float32))
    return wide.to(codec.dtype).reshape(*data.shape[:-1], TILE, head_dim).to(data.device)
