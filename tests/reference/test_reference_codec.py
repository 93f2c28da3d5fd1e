"""Tokens to canonical bytes and back: sizes, tails, `exact`, records, pages, and the golden bytes."""

import ast
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import kvpack
from kvpack import reference
from kvpack.reference import (
    CODECS,
    SIDES,
    codec_code,
    decode,
    dequantize,
    encode,
    encode_means,
    join_means,
    join_pages,
    join_record,
    means_bytes,
    names,
    page_bytes,
    quantize,
    record_bytes,
    sections,
    side_bytes,
    split_pages,
    split_record,
)
from kvpack.spec import parse, registry

TRELLIS = [name for name, codec in CODECS.items() if codec.stream]
GOLDEN = Path(__file__).parents[1] / "golden"


def gaussian(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).standard_normal(shape, np.float32)


def load_make() -> ModuleType:
    spec = importlib.util.spec_from_file_location("kvpack_golden_make", GOLDEN / "make.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", names())
def test_golden_bytes(name: str) -> None:
    made = load_make().golden(name)
    with np.load(GOLDEN / f"{name}.npz") as stored:
        assert set(stored.files) == set(made)
        for key in stored.files:
            np.testing.assert_array_equal(made[key], stored[key], err_msg=key)


def test_golden_files_are_small_and_complete() -> None:
    files = list(GOLDEN.glob("*.npz"))
    assert sorted(file.stem for file in files) == sorted(names())
    assert sum(file.stat().st_size for file in files) <= 110_000


def test_golden_input_is_pinned() -> None:
    x = load_make().inputs(64)
    assert x.dtype == np.float32
    assert x.shape == (2, 150, 64)
    # Token 0: 2^-26 times (sum of the fields - 131070).
    assert (x[0, 0, :3] * 2.0**26).tolist() == [53641, 23049, -61222]


def test_sizes() -> None:
    assert names() == [*registry()]
    assert {name: codec.id for name, codec in CODECS.items()} == {
        name: line.id for name, line in registry().items() if name != "exact"
    }
    assert sections("tq3", 128) == (128, 3072)
    assert sections("q8_0", 128) == (512, 8192)
    assert sections("q4_0", 64) == (256, 2048)
    assert [sections("exact", 64, "key", dtype)[1] for dtype in ("float32", "float16", "bfloat16")] == [
        16384,
        8192,
        8192,
    ]
    for name in names():
        for d in reference.HEAD_SIZES:
            assert all(size % 64 == 0 for size in sections(name, d))
            assert side_bytes(name, d, "key") == sum(sections(name, d))
            if name[:4] != "kivi" or d % 32 == 0:
                assert side_bytes(name, d, "key") == side_bytes(name, d, "value")
    assert (sections("kivi2", 80), sections("kivi2", 80, "value")) == ((640, 1280), (768, 1280))
    assert sections("fp8", 128) == (128, 8192)
    assert sections("q8_0", 80) == (384, 5120)
    assert sections("tq3", 112) == (128, 2688)
    with pytest.raises(ValueError, match="head size 72 is not supported"):
        side_bytes("tq4", 72, "key")
    with pytest.raises(ValueError, match="dtype 'float64' is not one of float32, float16, bfloat16"):
        side_bytes("exact", 64, "key", "float64")


def test_codec_codes() -> None:
    assert codec_code("exact") == 0
    assert codec_code("exact", dtype="bfloat16") == 2 << 16
    assert codec_code("q8_0", dtype="bfloat16") == 1
    assert codec_code("tq2") == 3 | 1 << 8
    assert codec_code("tq4", "stored") == 5
    assert codec_code("tq3", "unbiased", "float16") == 4 | 3 << 8
    assert codec_code("tq1", center="tile", search=True) == 6 | 1 << 8 | 2 << 24 | 1 << 28
    assert codec_code("rq4_0", center="mean") == 10 | 1 << 24
    for text in ("tcq3", "tcq4:scale=mse,center=mean,search", "rq8_0:center=tile", "q5_0", "exact"):
        spec = parse(text)
        assert codec_code(spec.name, spec.scale, center=spec.center or "none", search=spec.search) == spec.code()


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize(
    ("name", "tokens"),
    [
        pytest.param(name, tokens, marks=pytest.mark.full if name in TRELLIS and tokens not in (0, 1) else [])
        for name in names()
        for tokens in (0, 1, 63, 64, 65, 128)
    ],
)
def test_any_number_of_tokens(name: str, side: str, tokens: int) -> None:
    x = gaussian(2, 3, tokens, 64)
    packed, beside = encode(x, name, side=side), encode_means(x, name, "none", side)
    tiles = -(-tokens // 64)
    assert packed.shape == (2, 3, tiles, side_bytes(name, 64, side))
    assert packed.dtype == np.uint8
    back = decode(packed, name, side, 64, tokens, mean=beside)
    assert back.shape == x.shape
    assert back.dtype == np.float64
    if name == "exact":
        assert (back == x).all()
    else:
        codes, scales = quantize(x, name, side=side)
        known = beside if CODECS[name].split else None
        assert (back == dequantize(codes, scales, name, side, known=known)[..., :tokens, :]).all()
        special = {"kivi2": 0.17, "tqp2": 0.67, "tqp3": 0.2, "tqp4": 0.06}  # tqp: pi/2 of what their first part has
        allowed = special.get(name, {1: 0.42, 2: 0.13, 2.25: 0.11}.get(CODECS[name].bits, 0.05))
        assert ((back - x) ** 2).sum() <= allowed * (x**2).sum()
    whole = decode(packed, name, side, 64, mean=beside)
    assert whole.shape == (2, 3, 64 * tiles, 64)
    per_channel = name[:4] == "kivi" and side == "key"  # zeros take the nearest level of their group of 32
    assert (whole[..., -(-tokens // 32) * 32 if per_channel else tokens :, :] == 0).all()


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("name", names())
def test_a_tile_does_not_depend_on_its_neighbours(name: str, side: str) -> None:
    x = gaussian(2, 130, 128)
    packed = encode(x, name, side=side)
    maps = encode_means(x, name, "none", side)  # if it has a map, that of its row
    assert (packed[1, 1] == encode(x[1, 64:128], name, side=side, mean=maps[1])[0]).all()
    tail = np.zeros((64, 128), np.float32)
    tail[:2] = x[0, 128:]
    assert (packed[0, 2] == encode(tail, name, side=side, mean=maps[0])[0]).all()


@pytest.mark.parametrize("side", SIDES)
def test_exact_keeps_every_bit(side: str) -> None:
    bits = np.arange(2**16, dtype=np.uint16).reshape(-1, 64)  # 1024 tokens; infinities and NaN made finite below
    half = np.where((bits & 0x7C00) == 0x7C00, bits & 0x83FF, bits).astype(np.uint16)
    x16 = half.view(np.float16)
    packed = encode(x16, "exact", side=side)
    np.testing.assert_array_equal(decode(packed, "exact", side, 64, dtype="float16"), x16.astype(np.float64))
    brain = np.where((bits & 0x7F80) == 0x7F80, bits & 0x807F, bits).astype(np.uint16)
    wide = (brain.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    np.testing.assert_array_equal(decode(encode(brain, "exact", side=side), "exact", side, 64, dtype="bfloat16"), wide)
    x = np.ldexp(gaussian(64, 64), np.random.default_rng(0).integers(-160, 120, (64, 64)).astype(np.int32))
    np.testing.assert_array_equal(decode(encode(x, "exact", side=side), "exact", side, 64), x)


@pytest.mark.parametrize(
    "bad", [np.array(np.nan, np.float32), np.array(np.inf, np.float16), np.array(0xFF80, np.uint16)]
)
def test_exact_refuses_what_is_not_finite(bad: NDArray[Any]) -> None:
    x = np.zeros((3, 64), bad.dtype)
    x[1, 2] = bad
    with pytest.raises(ValueError, match="token 1: dim 2 is .*not finite"):
        encode(x, "exact")


def test_input_is_not_changed_and_output_is_writable() -> None:
    for name in names():
        x = gaussian(70, 64)
        before = x.copy()
        packed = encode(x, name)
        packed[...] = 0
        assert (x == before).all()


def test_decoding_what_does_not_fit_is_refused() -> None:
    packed = encode(gaussian(64, 64), "tq4")
    with pytest.raises(ValueError, match="tq3 needs"):
        decode(packed, "tq3", "key", 64)
    with pytest.raises(ValueError, match="65 tokens are not in 1 tiles"):
        decode(packed, "tq4", "key", 64, 65)
    with pytest.raises(ValueError, match="side 'both'"):
        decode(packed, "tq4", "both", 64)


def test_record_is_scales_then_codes() -> None:
    key, value = sections("tq4", 128), sections("q8_0", 64)
    keys = encode(gaussian(2, 200, 128), "tq4", side="key")
    values = encode(gaussian(2, 200, 64), "q8_0", side="value")
    records = join_record(keys, values, key, value)
    assert records.shape == (2, 4, record_bytes(key, value))
    assert (records[..., :128] == keys[..., :128]).all()
    assert (records[..., 128:384] == values[..., :256]).all()
    assert (records[..., 384 : 384 + 4096] == keys[..., 128:]).all()
    assert (records[..., 384 + 4096 :] == values[..., 256:]).all()
    back = split_record(records, key, value)
    assert (back[0] == keys).all()
    assert (back[1] == values).all()


def test_record_of_any_sizes() -> None:
    key, value = (2, 4), (1, 3)
    keys, values = np.arange(6, dtype=np.uint8), np.arange(20, 24, dtype=np.uint8)
    record = join_record(keys, values, key, value)
    assert record.tolist() == [0, 1, 20, 2, 3, 4, 5, 21, 22, 23]
    assert [part.tolist() for part in split_record(record, key, value)] == [keys.tolist(), values.tolist()]


@pytest.mark.parametrize("tiles", [0, 1, 4, 5])
def test_page_is_heads_then_slots(tiles: int) -> None:
    sides = sections("tq2", 64), sections("tq2", 64)
    records = np.random.default_rng(tiles).integers(0, 256, (3, tiles, record_bytes(*sides)), np.uint8)
    pages = join_pages(records)
    assert pages.shape == (-(-tiles // 4), page_bytes(*sides, kv_heads=3))
    assert (split_pages(pages, 3, tiles, records.shape[-1]) == records).all()
    if tiles == 5:
        size = record_bytes(*sides)
        assert (pages[0, (2 * 4 + 3) * size :][:size] == records[2, 3]).all()
        assert (pages[1, 1 * 4 * size :][:size] == records[1, 4]).all()
        assert not pages[1, (1 * 4 + 1) * size : 2 * 4 * size].any()


def test_means_lie_behind_the_records_of_their_head() -> None:
    sides = sections("tq2", 64), sections("q4_0", 80)
    rng = np.random.default_rng(0)
    records = rng.integers(0, 256, (3, 6, record_bytes(*sides)), np.uint8)
    key, value = rng.integers(0, 256, (3, 6, 66), np.uint8), rng.integers(0, 256, (3, 2, 82), np.uint8)
    centers = [("tile", 64), ("mean", 80)]
    means = join_means(2, [("tile", key), ("mean", value)])
    assert means.shape == (3, 2, means_bytes(centers)) == (3, 2, 384)
    pages = join_pages(records, means)
    assert pages.shape == (2, page_bytes(*sides, 3, centers))
    assert (split_pages(pages, 3, 6, records.shape[-1]) == records).all()
    part = pages[1].reshape(3, -1)[2, 4 * records.shape[-1] :]
    assert (part[:128] == key[2, 4:, :64].reshape(-1)).all()
    assert not part[128:256].any()  # no tiles there
    assert (part[256:336] == value[2, 1, :80]).all()
    assert (part[336:340] == key[2, 4:, 64:].reshape(-1)).all()
    assert not part[340:344].any()
    assert (part[344:346] == value[2, 1, 80:]).all()
    assert not part[346:].any()
    assert means_bytes([("none", 64), ("none", 80)]) == 0
    assert join_means(2, [("none", key[:, :0]), ("none", value[:, :0])]).shape == (3, 2, 0)


@pytest.mark.parametrize("center", ["mean", "tile"])
def test_means_are_of_the_tokens_that_are_not_zeros(center: str) -> None:
    x = gaussian(7 * 64, 64) + np.linspace(-3, 3, 64, dtype=np.float32)
    x[: 4 * 64 + 10] = 0
    means = encode_means(x, "tq4", center)
    assert means.shape == (7 if center == "tile" else 2, 66)
    levels, scales = means[:, :64].view(np.int8), np.ascontiguousarray(means[:, 64:]).view("<f2")
    assert not levels[: 4 if center == "tile" else 1].any()
    assert not scales[: 4 if center == "tile" else 1].any()
    found = reference.rotate(levels * scales.astype(np.float64), inverse=True)
    at = 4 if center == "tile" else 1
    want = x[4 * 64 + 10 : 5 * 64].astype(np.float64).mean(0)
    assert np.abs(levels[at]).max() == 127
    assert np.linalg.norm(found[at] - want) < 0.01 * np.linalg.norm(want)
    assert (found[:at] == 0).all()


def test_the_reference_depends_on_numpy_only() -> None:
    for file in Path(reference.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            found = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                assert node.level < 2, f"{file.name} reaches outside"
                found += [node.module or ""] if node.level == 0 else []
            outside = {name.split(".")[0] for name in found} - {"numpy", *sys.stdlib_module_names}
            assert not outside, f"{file.name} imports {outside}"


def test_every_codec_is_registered_once() -> None:
    assert [codec.id for codec in CODECS.values()] == list(range(1, len(CODECS) + 1))
    for name, codec in CODECS.items():
        line = registry()[name]
        assert (line.bits, line.rotated, line.scale_rules, line.trellis, line.elements, line.asymmetric) == (
            codec.bits, codec.rotated, codec.scale_rules, codec.stream, codec.elements, codec.asymmetric
        )  # fmt: skip
        assert (line.scale_block, line.split) == (codec.scale_block, codec.split)


@pytest.mark.parametrize("d", reference.HEAD_SIZES)
@pytest.mark.parametrize("name", ["exact", *CODECS])
def test_bits_are_what_full_tiles_measure(name: str, d: int) -> None:
    x = np.zeros((2, 256, d), np.float32)
    for center in ("none", "mean", "tile") if name in CODECS and CODECS[name].rotated else ("",):
        for side in SIDES:
            codec = kvpack.codec(f"{name}:center={center}" if center else name, d, side)
            assert codec.encode(x).nbytes * 8 == pytest.approx(codec.bits * x.size, rel=1e-12), (center, side)
