"""Golden bytes: what the encoders make of a fixed input. Run it to write the files again: `python make.py`.

A change of these files is a change of the format, and needs a new format version.

One file per codec, <codec>.npz, with for each side and head size (64, 80, 128, 256; trellis codes, whose search takes
its time: 64 and 80, and row 0 alone), one entry per rule in `rules`:

    rules                        scale rules (trellis codes: `norm`), or element dtypes for `exact`, or one empty string
    <side>_<d>_sha256            of all bytes: `inputs(d)` encoded, uint8 [2, 3 tiles, side_bytes], C order
    <side>_<d>_tile0             uint8 [rules, side_bytes]: tile 0 of row 0 (d = 64 and 128 only, not for
    `exact`; of codecs from q5_0 and tq1 on the first rule and d = 64 only)
    options                      centres, rotated codecs; with ",search" where the codec has scale rules
    <side>_64_options_sha256     of all bytes and then of the means, default rule, for each of `options`
    records_sha256 (tq4.npz)     records of tq4 keys and tq3 values, d = 128, default rule: [2, 3 tiles, record]

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
OPTIONS = ("mean", "tile", "none,search", "tile,search")
FIRST = ("q8_0", "q4_0", "tq2", "tq3", "tq4")  # whose files have a tile of every rule
ROWS, TOKENS = 2, 150  # three tiles, the last one filled up with zeros
DTYPES = ("float32", "float16", "bfloat16")


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
    return hashlib.sha256(np.ascontiguousarray(packed).tobytes()).hexdigest()


def _centred(x: NDArray[np.float32], name: str, side: str, center: str, search: str = "") -> str:
    packed = encode(x, name, side=side, center=center, search=bool(search))
    return _digest(np.concatenate((packed.reshape(-1), encode_means(x, name, center, side).reshape(-1))))


def golden(name: str) -> dict[str, NDArray[Any]]:
    """The contents of <name>.npz, from the reference."""
    exact = name == "exact"
    codec = CODECS.get(name)
    rules: tuple[str, ...] = DTYPES if codec is None else tuple(SCALE_RULES) if codec.scale_rules else ("",)
    trellis = codec is not None and codec.stream
    if trellis:
        rules = ("norm",)
    out: dict[str, NDArray[Any]] = {"rules": np.array(rules)}
    for d in HEAD_SIZES[:2] if trellis else HEAD_SIZES:
        x = inputs(d)[:1] if trellis else inputs(d)
        for side in SIDES:
            if exact:
                packed = [encode(as_elements(x, dtype), name, side=side) for dtype in rules]
            else:
                packed = [encode(x, name, rule or None, side) for rule in rules]
            out[f"{side}_{d}_sha256"] = np.array([_digest(each) for each in packed])
            if d in (64, 128) and name in FIRST:
                out[f"{side}_{d}_tile0"] = np.stack([each[0, 0] for each in packed])
            elif d == 64 and not exact:
                out[f"{side}_{d}_tile0"] = packed[0][0, 0][None]
    if codec is not None and codec.rotated:
        options = [text for text in OPTIONS if codec.scale_rules or "," not in text]
        out["options"] = np.array(options)
        x = inputs(64)[:1] if trellis else inputs(64)
        for side in SIDES:
            out[f"{side}_64_options_sha256"] = np.array([_centred(x, name, side, *text.split(",")) for text in options])
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
