"""Writes golden.inc: FNV-1a 64 hashes of the canonical bytes that kvpack.reference makes of a fixed input.

    python tests/cpp/make_golden.py            write it again
    python tests/cpp/make_golden.py --check    exit with 1 if it is out of date

One line per codec code, side and head size: the hash of all bytes of `inputs(d)` (tests/golden/make.py), encoded,
uint8 [2, 3 tiles, side_bytes], followed by those of its means and maps, uint8 [2, n, entry]. The last line is of pages:
the records of tq4 keys and tq3 values, head_dim 128.
"""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
from numpy.typing import NDArray

HERE = Path(__file__).parent

# The specification needs NumPy only: it is imported from the source tree, past the package's own imports, so that
# nothing has to be built or installed first.
if "kvpack" not in sys.modules:
    package = ModuleType("kvpack")
    package.__path__ = [str(HERE.parent.parent / "python" / "kvpack")]
    sys.modules["kvpack"] = package

from kvpack import reference  # noqa: E402

HEADER = """// FNV-1a 64 hashes of canonical bytes, from the NumPy reference. Written by make_golden.py; do not edit.
// A change of a line is a change of the format, and needs a new format version.
// {codec code, side, head_dim, hash}; the last line: records of tq4 keys and tq3 values.
"""


def fnv1a(data: NDArray[np.uint8]) -> int:
    """FNV-1a, 64 bits (Fowler, Noll, Vo)."""
    value = 0xCBF29CE484222325
    for byte in data.tobytes():
        value = (value ^ byte) * 0x100000001B3 & 0xFFFFFFFFFFFFFFFF
    return value


def golden_module() -> ModuleType:
    """tests/golden/make.py, which is a script and no package."""
    spec = importlib.util.spec_from_file_location("golden_make", HERE.parent / "golden" / "make.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def lines() -> list[str]:
    """The entries of golden.inc."""
    make = golden_module()
    out = []
    for name in reference.names():
        exact = name == "exact"
        for option in make.options(name):
            rule = None if exact else option or None
            code = reference.codec_code(name, dtype=option) if exact else reference.codec_code(name, rule)
            for side in (0, 1):
                for d in make.head_sizes(name, option):
                    x = make.inputs(d)
                    x = make.as_elements(x, option) if exact else x
                    tiles = reference.encode(x, name, rule, reference.SIDES[side])
                    means = reference.encode_means(x, name, "none", reference.SIDES[side])
                    digest = fnv1a(np.append(tiles.ravel(), means.ravel()))
                    out.append(f"{{0x{code:05x}, {side}, {d}, 0x{digest:016x}ULL}},  // {name} {option}".rstrip())
    for name, center, search, d in make.OPTIONS:
        code = reference.codec_code(name, None, center=center, search=search)
        for side in (0, 1):
            x, of = make.inputs(d), reference.SIDES[side]
            tiles = reference.encode(x, name, None, of, center, search)
            digest = fnv1a(np.append(tiles.ravel(), reference.encode_means(x, name, center, of).ravel()))
            comment = f"{name} norm, {center}" + ", search" * search
            out.append(f"{{0x{code:05x}, {side}, {d}, 0x{digest:016x}ULL}},  // {comment}")
    x = make.inputs(128)
    key, value = reference.sections("tq4", 128), reference.sections("tq3", 128)
    sides = reference.encode(x, "tq4", side="key"), reference.encode(x, "tq3", side="value")
    out.append(f"{{-1, 0, 128, 0x{fnv1a(reference.join_record(*sides, key, value)):016x}ULL}},  // records")
    return out


def main() -> int:
    """Write or check golden.inc."""
    target = HERE / "golden.inc"
    text = HEADER + "\n".join(lines()) + "\n"
    if "--check" in sys.argv[1:]:
        return 0 if target.exists() and target.read_text(encoding="utf-8") == text else 1
    target.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
