"""Golden bytes: what the encoders make of a fixed input. Run it to write the files again: `python make.py`.

A change of these files is a change of the format, and needs a new format version.

One file per codec, <codec>.npz. Of the codecs in BYTES and `exact`, with for each side and head size (64, 80, 128,
256), one entry per rule in `rules`:

    rules                        scale rules, or element dtypes for `exact`, or one empty string
    <side>_<d>_sha256            of all bytes: `inputs(d)` encoded, uint8 [2, 3 tiles, side_bytes], C order
    <side>_<d>_tile0             uint8 [rules, side_bytes]: tile 0 of row 0 (d = 64 and 128 only, 64 of q8_0, not
                                 for `exact`)
    records_sha256 (tq4.npz)     records of tq4 keys and tq3 values, d = 128, default rule: [2, 3 tiles, record]

Of the others, and for the codecs in OPTIONS:

    rules                        as above
    sha256                       [side][head size][rule]; an empty string for what `head_sizes` leaves out; of split
                                 codecs with the maps, uint8 [2, 1, d / 8], behind the bytes
    options_sha256               [line of OPTIONS][side], default rule: of all bytes, followed by the means and maps,
                                 uint8 [2, n, entry]

The input needs no library: `inputs` below is integer arithmetic on splitmix64 (Steele, Lea, Flood 2014).
"""

import hashlib
import sys
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvpack.reference import CODECS, SCALE_RULES, SIDES, encode, encode_means, join_record, sections

HERE = Path(__file__).parent
HEAD_SIZES = (64, 80, 128, 256)
ROWS, TOKENS = 2, 150  # three tiles, the last one filled up with zeros
DTYPES = ("float32", "float16", "bfloat16")

BYTES = ("q8_0", "q4_0", "tq2", "tq3", "tq4")
"""Codecs with whole tiles; of the others there are hashes."""

OPTIONS = (
    ("tq3", "tile", False, 80),
    ("tq4", "mean", False, 128),
    ("tq4", "none", True, 64),
    ("rq4_0", "tile", False, 112),
    ("tcq2", "tile", False, 80),
    ("tcq2", "none", True, 64),
    ("tqp3", "tile", True, 80),
    ("tq2.5", "tile", True, 192),
    ("tq3.5", "mean", False, 112),
)
"""Centring and the search of the scale: codec, center, search, head size."""


def options(name: str) -> tuple[str, ...]:
    """Scale rules of a codec, dtypes of `exact`, or one empty string."""
    return DTYPES if name == "exact" else tuple(SCALE_RULES) if CODECS[name].scale_rules else ("",)


def head_sizes(name: str, rule: str = "") -> tuple[int, ...]:
    """Those of a codec and rule: searching a trellis and projecting take long, parts are codecs of their own."""
    slow = name in CODECS and (CODECS[name].stream or name.startswith("tqp") or CODECS[name].split)
    return (64,) if slow and rule not in ("", "norm") else HEAD_SIZES


def inputs(d: int) -> NDArray[np.float32]:
    """float32 [2, 150, d]. Element i (C order) comes from word i of splitmix64 with the seed d: the sum of
    its four 16-bit fields, minus 131070, times 2^-15 (nearly Gaussian), times 2^((7 token mod 17) - 11).
    Then, in row 0:

        token 3   zeros                                  token 17  all -1
        token 5   one-hot: -3 at dim 20                  token 19  1, -1, 1, -1, ...
        token 7   zeros, -0.0 at odd dims                token 21  every dim times 2^-(dim mod 40)
        token 9   multiplied by 2^-130: denormals        token 23  multiplied by 2^8
        token 11  multiplied by 2^-90: scales underflow  token 25  multiplied by 2^-13: denormal fp16 scales
    """
    count = ROWS * TOKENS * d
    with np.errstate(over="ignore"):
        z = np.uint64(d) + np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ z >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ z >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
        z = z ^ z >> np.uint64(31)
    parts = [z >> np.uint64(16 * i) & np.uint64(0xFFFF) for i in range(4)]
    fields = (parts[0] + parts[1] + parts[2] + parts[3]).astype(np.int32)
    sums = (fields - 131070).astype(np.float32).reshape(ROWS, TOKENS, d)
    token, dim = np.arange(TOKENS), np.arange(d)
    x: NDArray[np.float32] = np.ldexp(sums, (7 * token % 17 - 11 - 15).astype(np.int32)[:, None])
    first = x[0]
    first[3] = 0
    first[5] = 0
    first[5, 20] = -3
    first[7] = np.where(dim % 2, np.float32(-0.0), np.float32(0))
    first[9] = np.ldexp(first[9], -130)
    first[11] = np.ldexp(first[11], -90)
    first[17] = -1
    first[19] = np.where(dim % 2, np.float32(-1), np.float32(1))
    first[21] = np.ldexp(first[21], -(dim % 40).astype(np.int32))
    first[23] = np.ldexp(first[23], 8)
    first[25] = np.ldexp(first[25], -13)
    return x


def as_elements(x: NDArray[np.float32], dtype: str) -> NDArray[Any]:
    """float32 -> the elements of `exact`: float16 rounded, bfloat16 truncated (the upper 16 bits, uint16)."""
    if dtype == "float16":
        return x.astype(np.float16)
    return (x.view(np.uint32) >> 16).astype(np.uint16) if dtype == "bfloat16" else x


def _digest(packed: NDArray[np.uint8]) -> str:
    return hashlib.sha256(np.ascontiguousarray(packed).tobytes()).hexdigest() if packed.size else ""


def _tiles(name: str, rule: str, d: int, side: str) -> NDArray[np.uint8]:
    """The bytes of tiles; of split codecs flat, with the maps behind them."""
    x = inputs(d)
    tiles, maps = encode(x, name, rule or None, side), encode_means(x, name, "none", side)
    return np.append(tiles.ravel(), maps.ravel()) if maps.size else tiles


def _with_options(name: str, center: str, search: bool, d: int, side: str) -> str:
    x = inputs(d)
    tiles = encode(x, name, None, side, center, search)
    return _digest(np.append(tiles.ravel(), encode_means(x, name, center, side).ravel()))


def golden(name: str) -> dict[str, NDArray[Any]]:
    """The contents of <name>.npz, from the reference."""
    exact = name == "exact"
    rules = options(name)
    out: dict[str, NDArray[Any]] = {"rules": np.array(rules)}

    def packed(d: int, side: str) -> list[NDArray[np.uint8]]:
        if exact:
            return [encode(as_elements(inputs(d), dtype), name, side=side) for dtype in rules]
        empty = np.zeros(0, np.uint8)
        return [_tiles(name, rule, d, side) if d in head_sizes(name, rule) else empty for rule in rules]

    if exact or name in BYTES:
        for d, side in ((d, side) for d in HEAD_SIZES for side in SIDES):
            each_rule = packed(d, side)
            out[f"{side}_{d}_sha256"] = np.array([_digest(each) for each in each_rule])
            if not exact and d in ((64,) if name == "q8_0" else (64, 128)):
                out[f"{side}_{d}_tile0"] = np.stack([each[0, 0] for each in each_rule])
    else:
        out["sha256"] = np.array([[[_digest(x) for x in packed(d, side)] for d in HEAD_SIZES] for side in SIDES])
    if any(option[0] == name for option in OPTIONS):
        out["options_sha256"] = np.array(
            [[_with_options(*option, side) for side in SIDES] for option in OPTIONS if option[0] == name]
        )
    if name == "tq4":
        x = inputs(128)
        sides = encode(x, "tq4", side="key"), encode(x, "tq3", side="value")
        records = join_record(*sides, sections("tq4", 128), sections("tq3", 128))
        out["records_sha256"] = np.array([_digest(records)])
    return out


def main() -> None:
    """Write every file, into this directory or the one given."""
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else HERE
    for name in ("exact", *CODECS):
        np.savez_compressed(folder / f"{name}.npz", **golden(name))  # type: ignore[arg-type]


if __name__ == "__main__":
    main()
