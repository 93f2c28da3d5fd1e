"""The codecs of split channels tq2.5 and tq3.5: a quarter of the channels, the outliers, gets a bit more than the rest.

    x -> | outlier channels | the others |     tq3 | tq2 (tq4 | tq3), each with a rotation and a scale of its own

Which channels are outliers is a *map* of d bits: those of the largest energy in the row's first tile that has a vector
other than zeros, frozen for the row. A map of zeros says that there is no such tile so far.

Float32, and the order of operations is the specification (see `quantize`). Source: TurboQuant (arXiv 2504.19874),
section 4.3, with a map for each row and KV head in the place of a calibrated one.
"""

from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from .codebooks import Codebook
from .hadamard import hadamard_transform
from .rotated import Mean, average_of, mean_levels
from .rotation import rotate, signs
from .tq import lloyd_max_quantize

__all__ = ["find_maps", "gather", "part_sizes", "row_maps", "split_mean", "split_quantize", "split_rotate_back"]

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]
Codes = NDArray[np.uint8]
Float = TypeVar("Float", np.float32, np.float64)


def part_sizes(d: int) -> tuple[int, int]:
    """Outlier channels and others: a quarter of d in whole blocks of 16, rounded to even; 32 of 128."""
    outliers = 16 * round(d / 64)
    return outliers, d - outliers


def find_maps(x: F32) -> Codes:
    """The maps of tiles float32 [n, 64, d], each for itself: uint8 [n, d / 8], zeros where all vectors are zeros.

    Bit i % 8 of byte i / 8 is channel i. Energies are sums of squares, token after token; of equal ones, the lower
    channel is taken first.
    """
    n, tokens, d = x.shape
    peak = np.max(np.abs(x), axis=(1, 2))
    e = np.frexp(np.where(peak == 0, np.float32(1), peak))[1] - np.int32(1)
    scaled = np.ldexp(x, -e[:, None, None])
    energy = np.zeros((n, d), np.float32)
    for t in range(tokens):
        energy = energy + scaled[:, t] * scaled[:, t]
    chosen = np.zeros((n, d), np.bool_)
    np.put_along_axis(chosen, np.argsort(-energy, axis=-1, kind="stable")[:, : part_sizes(d)[0]], True, axis=-1)
    return np.packbits(chosen & (peak > 0)[:, None], axis=-1, bitorder="little")


def row_maps(maps: Codes) -> Codes:
    """Of the maps [..., tiles, d / 8] that tiles would have, those that they have: the first one, from there on."""
    known = np.any(maps != 0, axis=-1)
    first = np.argmax(known, axis=-1)[..., None]
    frozen = np.take_along_axis(maps, first[..., None], axis=-2)
    here = (np.arange(maps.shape[-2]) >= first) & np.any(known, axis=-1, keepdims=True)
    return np.where(here[..., None], frozen, np.uint8(0))


def channels(maps: Codes) -> NDArray[np.intp]:
    """The channels of both parts, intp [n, d]: the outliers ascending, then the others ascending."""
    return np.argsort(1 - np.unpackbits(maps, axis=-1, bitorder="little").astype(np.int8), axis=-1, kind="stable")


def gather(x: NDArray[Float], maps: Codes) -> NDArray[Float]:
    """Tiles [n, 64, d] with the channels of both parts one after the other."""
    return np.take_along_axis(x, channels(maps)[:, None, :], axis=-1)


def split_quantize(
    x: F32, side: str, rule: str, search: bool, mean: Mean | None, *, books: tuple[Codebook, Codebook]
) -> tuple[Codes, F32]:
    """Gathered x float32 [n, 64, d] -> codes [n, 64, d], scales float32 [n, 64, 2]: each part for itself."""
    first = part_sizes(x.shape[-1])[0]
    means = [None, None] if mean is None else [(levels, mean[1]) for levels in np.split(mean[0], [first], axis=-1)]
    parts = np.split(x, [first], axis=-1)
    found = [
        lloyd_max_quantize(np.ascontiguousarray(part), side, rule, search, own, book=book)
        for part, own, book in zip(parts, means, books, strict=True)
    ]
    codes, scales = zip(*found, strict=True)
    return np.concatenate(codes, axis=-1), np.concatenate(scales, axis=-1)


def split_mean(x: F32) -> tuple[NDArray[np.int8], F32]:
    """`mean_of` of gathered tiles: both parts in the domain of their orthonormal rotations, with one scale."""
    average, e, live = average_of(x)
    parts = np.split(average, [part_sizes(x.shape[-1])[0]], axis=-1)
    y = [hadamard_transform(signs(p.shape[-1]) * p) * np.float32(1 / np.sqrt(p.shape[-1])) for p in parts]
    return mean_levels(np.concatenate(y, axis=-1), e, live, np.float32(1))


def split_rotate_back(x: F64, maps: Codes) -> F64:
    """Tiles [n, 64, d] of both parts in their rotated domains to vectors, the channels in their places."""
    parts: list[Any] = np.split(x, [part_sizes(x.shape[-1])[0]], axis=-1)
    out = np.empty_like(x)
    back = np.concatenate([rotate(part, inverse=True) for part in parts], axis=-1)
    np.put_along_axis(out, channels(maps)[:, None, :], back, axis=-1)
    return out
