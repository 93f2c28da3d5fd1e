"""Codecs on arrays: ``kvpack.codec("tq4", head_dim=128, side="key").encode(x)``, for NumPy arrays and torch tensors.

The result is :class:`Packed`: the canonical bytes of whole tiles of one side (``csrc/kvpack/format.h``), the same
bytes that a cache keeps in its pages.
"""

from __future__ import annotations

import math
import os
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeGuard

import numpy as np

from kvpack import _core
from kvpack.spec import DTYPES, PAGE_TILES, TILE, CodecSpec, Dtype, Side, parse, registry, side_index

if TYPE_CHECKING:
    import torch

    Array = np.ndarray[Any, Any] | torch.Tensor


def codecs() -> list[str]:
    """Names of all codecs, in the order of the registry."""
    return list(registry())


def build_info() -> dict[str, Any]:
    """Facts about the compiled core: version, architecture, compiler, operator library, format version."""
    return dict(_core.build_info())


def nonfinite_mode() -> str:
    """What happens to NaN and Inf: ``"error"``, or ``"zero"`` (environment variable ``KVPACK_NONFINITE``)."""
    mode = os.environ.get("KVPACK_NONFINITE", "error")
    if mode not in ("error", "zero"):
        raise ValueError(f"KVPACK_NONFINITE={mode!r}; allowed: 'error', 'zero'")
    return mode


@dataclass(frozen=True)
class Packed:
    """Encoded vectors of one side.

    Attributes:
        data: uint8 ``[..., tiles, side_bytes]``, a NumPy array or a tensor, as the input was.
        means: uint8 ``[..., n, head_dim + 2]``, int8 levels and an fp16 scale each: one mean for a tile
            (``center=tile``), one for four tiles (``center=mean``), else none. Split codecs (``tq2.5``, ``tq3.5``):
            each followed by the map of the row's channels, ``head_dim / 8`` bytes; not centred, a map for four tiles.
        shape: shape of the input, ``[..., tokens, head_dim]``.
        dtype: dtype of the input.
        nonfinite: how many non-finite elements were replaced by zero (``KVPACK_NONFINITE=zero``).
    """

    data: Any
    means: Any
    shape: tuple[int, ...]
    dtype: Dtype
    spec: CodecSpec
    side: Side
    nonfinite: int = 0

    @property
    def nbytes(self) -> int:
        """Bytes of all tiles and means, the unused tail of the last tile included."""
        return int(self.data.nbytes) + int(self.means.nbytes)


@dataclass(frozen=True)
class Codec:
    """A codec for one head size and side; made by :func:`codec`."""

    spec: CodecSpec
    head_dim: int
    side: Side

    @property
    def bits(self) -> float:
        """Honest bits per value of :class:`Packed`: codes, scales and all metadata (``exact``: of float32).

        Of tokens in fours of full tiles, which share a mean under ``center=mean``. Pages hold the same bits, with one
        exception: split codecs under ``center=tile`` have a map in each mean here, one in a page there.
        """
        code, side = self.spec.code("float32"), side_index(self.side)
        tiles = PAGE_TILES * self.spec.side_bytes(self.head_dim, self.side)
        means = _core.array_mean_bytes(code, self.head_dim, side, PAGE_TILES)
        return 8 * (tiles + means) / (PAGE_TILES * TILE * self.head_dim)

    def encode(self, x: Array) -> Packed:
        """Encode ``x`` ``[..., tokens, head_dim]`` (float32, float16, bfloat16; float64 is rounded to float32).

        Tokens are padded with zero vectors to whole tiles of 64.

        Raises:
            TypeError: not an array of floats.
            ValueError: wrong shape; NaN or Inf (unless ``KVPACK_NONFINITE=zero``); a norm whose fp16 scale overflows.
        """
        if _is_tensor(x):
            return self._encode_tensor(x)
        if not isinstance(x, np.ndarray):
            raise TypeError(f"encode takes a NumPy array or a torch tensor, not {type(x).__name__}")
        if x.dtype not in (np.float16, np.float32, np.float64):
            raise TypeError(f"encode: dtype {x.dtype} is not supported; allowed: float64, float32, float16")
        self._check(x.shape)
        if x.dtype == np.float64:
            x = x.astype(np.float32)
        replaced = 0
        if nonfinite_mode() == "zero":
            finite = np.isfinite(x)
            replaced = int(x.size - np.count_nonzero(finite))
            x = np.where(finite, x, x.dtype.type(0)) if replaced else x
        dtype: Dtype = "float16" if x.dtype == np.float16 else "float32"
        lead = x.shape[:-2]
        flat = np.ascontiguousarray(x).reshape(-1 if 0 not in x.shape[:-2] else 0, *x.shape[-2:])
        data, means = _core.encode(flat, self.spec.code(dtype), side_index(self.side))
        data, means = (part.reshape(*lead, *part.shape[-2:]) for part in (data, means))
        return Packed(data, means, tuple(x.shape), dtype, self.spec, self.side, replaced)

    def decode(self, packed: Packed) -> Array:
        """Decode to ``[..., tokens, head_dim]``: float32 for NumPy, the input's dtype for tensors.

        ``exact`` gives the input back bit for bit, in its own dtype.

        Raises:
            ValueError: ``packed`` was made by another codec, head size or side.
        """
        if (packed.spec, packed.shape[-1], packed.side) != (self.spec, self.head_dim, self.side):
            raise ValueError(
                f"packed by {packed.spec} for {packed.side}s of {packed.shape[-1]}; this codec is {self.spec} "
                f"for {self.side}s of {self.head_dim}"
            )
        code, side, tokens = self.spec.code(packed.dtype), side_index(self.side), packed.shape[-2]
        if _is_tensor(packed.data):
            import torch

            from kvpack import ops

            dtype = getattr(torch, packed.dtype)
            return ops.decode(packed.data, packed.means, code, side, tokens, self.head_dim, dtype)
        rows = math.prod(packed.shape[:-2])
        data, means = (np.ascontiguousarray(x).reshape(rows, *x.shape[-2:]) for x in (packed.data, packed.means))
        x = _core.decode(data, means, code, side, tokens, self.head_dim).reshape(packed.shape)
        return x.astype(np.float16) if self.spec.info.bits == 0 and packed.dtype == "float16" else x

    def _check(self, shape: tuple[int, ...]) -> None:
        if len(shape) < 2 or shape[-1] != self.head_dim:
            raise ValueError(f"encode: shape {tuple(shape)} is not [..., tokens, {self.head_dim}]")

    def _encode_tensor(self, x: torch.Tensor) -> Packed:
        import torch

        from kvpack import ops

        if x.dtype == torch.float64:
            x = x.float()
        dtype = str(x.dtype).removeprefix("torch.")
        if dtype not in DTYPES:
            raise TypeError(f"encode: dtype {x.dtype} is not supported; allowed: float64, {', '.join(DTYPES)}")
        self._check(tuple(x.shape))
        replaced = 0
        if nonfinite_mode() == "zero":
            finite = torch.isfinite(x)
            replaced = int(x.numel() - int(finite.sum()))
            x = torch.where(finite, x, torch.zeros((), dtype=x.dtype, device=x.device)) if replaced else x
        element = DTYPES[DTYPES.index(dtype)]
        data, means = ops.encode(x, self.spec.code(element), side_index(self.side))
        return Packed(data, means, tuple(x.shape), element, self.spec, self.side, replaced)


def _is_tensor(x: object) -> TypeGuard[torch.Tensor]:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(x, torch.Tensor)


def codec(name: str | CodecSpec, head_dim: int, side: Side = "key") -> Codec:
    """A codec by its string, for head vectors of ``head_dim`` values of one side.

    Keys and values have different tile layouts (``side``), the same codes and scales.

    Raises:
        ValueError: unknown codec or option; a head size or side that is not supported.
    """
    spec = parse(name)
    if isinstance(head_dim, bool) or not isinstance(head_dim, int):
        raise TypeError(f"head_dim is an integer, not {type(head_dim).__name__}")
    spec.side_bytes(head_dim, side)  # raises for a head size or a side that is not supported
    return Codec(spec, head_dim, side)
