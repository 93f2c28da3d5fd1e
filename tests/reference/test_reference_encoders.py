"""The float32 encoders against a scalar transcription of the specification, and at their edges."""

from typing import Any

import numpy as np
import pytest

from kvpack.reference import (
    CODEBOOKS,
    CODECS,
    HEAD_SIZES,
    SCALE_RULES,
    decode,
    dequantize,
    encode,
    hadamard_matrix,
    order_of,
    quantize,
    signs,
)
from kvpack.reference.codebooks import Codebook
from kvpack.reference.fp8 import e4m3_value
from kvpack.reference.normalise import lanes16_sum, normalise
from kvpack.reference.qjl import projection
from kvpack.reference.tq import assign

F = np.float32
ONE = F(1)
ROTATED = [name for name, codec in CODECS.items() if codec.rotated]
SCALAR = [name for name, codec in CODECS.items() if name in CODEBOOKS]  # quantized value by value, to a codebook
PROJECTED = [name for name in CODECS if name.startswith("tqp")]
QUICK = [("q4_0", None), ("tq3", "norm")]  # of head sizes that are no powers of two, outside the full suite
EVERY = [(name, rule) for name, codec in CODECS.items() for rule in (SCALE_RULES if codec.scale_rules else (None,))]


def scalar_lanes16(products: list[Any]) -> Any:
    acc = list(products[:16])
    for j in range(1, len(products) // 16):
        for lane in range(16):
            acc[lane] = F(acc[lane] + products[16 * j + lane])
    for half in (8, 4, 2, 1):
        for lane in range(half):
            acc[lane] = F(acc[lane] + acc[lane + half])
    return acc[0]


def scalar_exponent(m: Any) -> int:
    e = -149
    while float(m) >= 2.0 ** (e + 1):
        e += 1
    return e


def scalar_fp16(scale: Any, e: int) -> Any:
    return np.float16(F(float(scale) * 2.0**e))  # the product is exact in float64


def scalar_transform(scaled: list[Any]) -> list[Any]:
    """sqrt(d) R x."""
    d = len(scaled)
    y = [F(s * v) for s, v in zip(signs(d), scaled, strict=True)]
    m = order_of(d)
    width = d // m
    h = width // 2
    while h:
        for i in range(d):
            if not i & h:
                y[i], y[i + h] = F(y[i] + y[i + h]), F(y[i] - y[i + h])
        h //= 2
    if m > 1:
        matrix, rows = hadamard_matrix(m), y
        y = []
        for row in range(m):
            for c in range(width):
                total = F(matrix[row, 0] * rows[c])
                for s in range(1, m):
                    total = F(total + F(matrix[row, s] * rows[s * width + c]))
                y.append(total)
    return y


def book_of(name: str) -> Codebook:
    """That of the codec, or of its first part."""
    return CODEBOOKS[name] if name in CODEBOOKS else CODEBOOKS[f"tq{CODECS[name].bits - 1}"]


def scalar_rotated(x: np.ndarray, name: str, rule: str) -> tuple[list[int], list[Any]]:
    d, book = len(x), book_of(name)
    bits, projected = book.bits, name not in CODEBOOKS
    m = max(abs(v) for v in x)
    if m == 0:
        return [2 ** (bits - 1) + (2**bits if projected else 0)] * d, [np.float16(0)] * (1 + projected)
    e = scalar_exponent(m)
    scaled = [F(float(v) * 2.0**-e) for v in x]
    n2 = scalar_lanes16([F(v * v) for v in scaled])
    r = F(np.sqrt(n2))
    y = scalar_transform(scaled)
    inv = F(F(1) / r)
    codes = []
    for v in y:
        z = F(v * inv)
        magnitude = sum(bool(abs(z) > t) for t in book.thresholds)
        half = 2 ** (bits - 1)
        codes.append(half - 1 - magnitude if np.signbit(z) else half + magnitude)
    q = [int(book.levels[code]) for code in codes]
    cc = sum(level * level for level in q)
    xc = scalar_lanes16([F(v * F(level)) for v, level in zip(y, q, strict=True)])
    root = F(1 / np.sqrt(d))
    scale = {
        "stored": lambda: F(r * F(book.unit / np.sqrt(d))),
        "norm": lambda: F(r / F(np.sqrt(F(cc)))),
        "mse": lambda: F(F(xc * root) / F(cc)),
        "unbiased": lambda: F(n2 / F(xc * root)),
    }[rule]()
    if not projected:
        return codes, [scalar_fp16(scale, e)]
    step = F(scale * F(np.sqrt(d)))
    rest = [F(v - F(step * F(level))) for v, level in zip(y, q, strict=True)]
    size = F(F(np.sqrt(scalar_lanes16([F(v * v) for v in rest]))) * F(1 / d))
    inverse = F(127) / (max(abs(v) for v in rest) or F(np.inf))
    levels = [round(float(F(v * inverse))) for v in rest]
    products = [sum(int(g) * level for g, level in zip(row, levels, strict=True)) for row in projection(d)]
    signs = [2**bits if product >= 0 else 0 for product in products]
    return [a + b for a, b in zip(codes, signs, strict=True)], [scalar_fp16(scale, e), scalar_fp16(size, e)]


def scalar_rotated_blocks(x: np.ndarray, bits: int) -> tuple[list[int], list[Any]]:
    """The blocks of sqrt(d) R x, with 1 / sqrt(d) in the steps."""
    m = max(abs(v) for v in x)
    e = scalar_exponent(m) if m else 0
    y = scalar_transform([F(float(v) * 2.0**-e) for v in x])
    return scalar_blocks(np.array(y, F), bits, F(1 / np.sqrt(len(x))), e)


def scalar_blocks(x: np.ndarray, bits: int, factor: Any = ONE, power: int = 0) -> tuple[list[int], list[Any]]:
    codes: list[int] = []
    scales = []
    middle = 2 ** (bits - 1)
    for start in range(0, len(x), 32):
        block = x[start : start + 32]
        m = max(abs(v) for v in block)
        if m == 0:
            codes += [middle] * len(block)
            scales.append(np.float16(0))
            continue
        e = scalar_exponent(m)
        scaled = [F(float(v) * 2.0**-e) for v in block]
        if bits == 8:
            step = F(max(abs(v) for v in scaled) / F(127))
            codes += [round(float(F(v * F(F(1) / step)))) + 128 for v in scaled]
        else:
            extreme = next(v for v in scaled if abs(v) == max(abs(w) for w in scaled))
            step = F(extreme / F(-middle))
            inv = F(F(1) / step)
            codes += [min(2 * middle - 1, int(F(F(v * inv) + F(middle + 0.5)))) for v in scaled]
        scales.append(scalar_fp16(F(step * factor), e + power))
    return codes, scales


def scalar_e4m3(y: Any) -> int:
    """The nearest of all elements, of two the even one; the sign apart."""
    values = e4m3_value(np.arange(127, dtype=np.uint8), "key")
    distance = np.abs(values - abs(float(y)))
    nearest = np.flatnonzero(distance == distance.min())
    return int(nearest[nearest % 2 == 0][0] if len(nearest) > 1 else nearest[0]) | int(np.signbit(y)) << 7


def scalar_fp8(x: np.ndarray, bits: int) -> tuple[list[int], list[Any]]:
    m = max(abs(v) for v in x)
    if m == 0:
        return [0] * len(x), [np.float16(0)]
    e = scalar_exponent(m)
    scaled = [F(float(v) * 2.0**-e) for v in x]
    step = F(max(abs(v) for v in scaled) / F(448))
    return [scalar_e4m3(F(v * F(F(1) / step))) for v in scaled], [scalar_fp16(step, e)]


def vectors(d: int) -> np.ndarray:
    rng = np.random.default_rng(d)
    x = rng.standard_normal((14, d)).astype(F)
    x[1] *= F(1e-30)
    x[2] = np.ldexp(x[2], -140)
    x[3] = 0
    x[4] = 0
    x[4, 7] = -2.5
    x[5] *= F(300)
    x[6] = np.ldexp(x[6], -rng.integers(0, 60, d).astype(np.int32))
    x[7] = np.round(x[7])
    x[8] = np.where(np.arange(d) % 3, F(0.75), F(-0.75))
    x[9] = -0.0
    x[10] = 2.0**-149
    x[11, :32] = 0
    x[12] = x[12].astype(np.float16)
    x[13] = np.where(np.arange(d) == 5, F(2**15), np.ldexp(x[13], -120))
    return x


@pytest.mark.parametrize(
    ("name", "rule", "d"),
    [
        pytest.param(name, rule, d, marks=[] if d & (d - 1) == 0 or (name, rule) in QUICK else pytest.mark.full)
        for name, rule in EVERY
        for d in HEAD_SIZES
        if not (CODECS[name].stream or CODECS[name].asymmetric or CODECS[name].split)  # test_reference_trellis.py, ...
    ],
)
def test_vectorised_encoders_equal_a_scalar_transcription(name: str, rule: str | None, d: int) -> None:
    x = vectors(d)
    codes, scales = quantize(x, name, rule)
    for i, row in enumerate(x):
        codec = CODECS[name]
        blocks = scalar_rotated_blocks if codec.rotated else scalar_fp8 if name == "fp8" else scalar_blocks
        expected = blocks(row, codec.bits) if rule is None else scalar_rotated(row, name, rule)
        assert codes[i].tolist() == expected[0], f"vector {i}"
        got, want = scales[i].view(np.uint16).tolist(), np.array(expected[1]).view(np.uint16).tolist()
        assert got == want, f"vector {i}"


def test_lanes16_sum_is_not_the_plain_sum() -> None:
    x = (np.random.default_rng(0).standard_normal((50, 128)) * 1000).astype(F)
    assert [scalar_lanes16(list(row)) for row in x] == lanes16_sum(x).tolist()
    assert (lanes16_sum(x) != np.cumsum(x, axis=-1, dtype=F)[:, -1]).any()


def test_fp16_rounding_is_to_nearest_even_with_denormals() -> None:
    bits = np.arange(0x7BFF, dtype=np.uint16)  # every positive finite float16 but the last, and its successor
    low = bits.view(np.float16).astype(F)
    high = (bits + np.uint16(1)).view(np.float16).astype(F)
    middle = (low + high) / 2  # exact in float32
    even = np.where(bits % 2 == 0, bits, bits + 1)
    assert (middle.astype(np.float16).view(np.uint16) == even).all()
    assert (np.nextafter(middle, F(0)).astype(np.float16).view(np.uint16) == bits).all()
    assert (np.nextafter(middle, F(1e9)).astype(np.float16).view(np.uint16) == bits + 1).all()
    with np.errstate(over="ignore"):
        assert np.isinf(np.array([65520], F).astype(np.float16)).all()
    assert np.nextafter(F(65520), F(0)).astype(np.float16) == 65504


def test_powers_of_two_are_taken_out_exactly() -> None:
    tiny = np.full((1, 16), 2.0**-149, F)
    tiny[0, 1] = -3 * 2.0**-149
    scaled, e, live = normalise(tiny)
    assert e.tolist() == [[-148]]
    assert scaled[0, :2].tolist() == [0.5, -1.5]
    assert live.all()
    # Small elements of a huge vector become denormal, rounded once to nearest even: 1.5, 0.5 and 0.75 steps.
    huge = np.array([[2.0**127, 3 * 2.0**-23, 2.0**-23, 3 * 2.0**-24, 2.0**-149]], F)
    scaled, e, _ = normalise(huge)
    assert e.tolist() == [[127]]
    assert scaled.tolist() == [[1, 2 * 2.0**-149, 0, 2.0**-149, 0]]


@pytest.mark.parametrize("name", SCALAR)
def test_ties_take_the_smaller_level_and_the_sign_bit_decides(name: str) -> None:
    book = CODEBOOKS[name]
    half = len(book.positive)
    for k, t in enumerate(book.thresholds):
        up = np.nextafter(t, F(10))
        z = np.array([t, up, -t, -up], F)
        assert assign(z, book).tolist() == [half + k, half + k + 1, half - 1 - k, half - 2 - k]
    zeros = np.array([0.0, -0.0, 2.0**-149, -(2.0**-149)], F)
    assert assign(zeros, book).tolist() == [half, half - 1, half, half - 1]
    assert assign(np.array([100, -100], F), book).tolist() == [2 * half - 1, 0]


@pytest.mark.parametrize("name", CODECS)
def test_zeros_have_scale_zero_and_the_code_of_zero(name: str) -> None:
    for zero in (0.0, -0.0):
        codes, scales = quantize(np.full((3, 64), zero, F), name)
        codec = CODECS[name]
        if not codec.stream and not codec.split:  # the codes of a trellis spell a path, which has no middle
            middle = 0 if codec.elements or codec.asymmetric else 1 << int(codec.bits - 1)
            assert (codes == (middle | middle >> 1 if name in PROJECTED else middle)).all()
        assert (scales.view(np.uint16) == 0).all()
        assert (dequantize(codes, scales, name) == 0).all()


@pytest.mark.parametrize("name", SCALAR)
def test_one_hot_gives_one_magnitude_and_decodes_to_itself(name: str) -> None:
    x = np.zeros((128, 128), F)
    np.fill_diagonal(x, -1.5)
    codes, scales = quantize(x, name, "norm")
    magnitudes = np.abs(CODEBOOKS[name].levels.astype(int))[codes]
    assert len(np.unique(magnitudes)) == 1
    np.testing.assert_allclose(dequantize(codes, scales, name), x, atol=1e-3)


@pytest.mark.parametrize(("name", "rule"), EVERY)
def test_tiny_vectors_decode_to_zeros(name: str, rule: str | None) -> None:
    x = np.random.default_rng(1).standard_normal((4, 64)).astype(F)
    for tiny in (x * F(1e-30), np.ldexp(x, -140)):
        assert tiny.any()
        assert (decode(encode(tiny, name, rule), name, "key", 64, 4) == 0).all()


@pytest.mark.parametrize(("name", "rule"), EVERY)
@pytest.mark.parametrize("side", ["key", "value"])
def test_a_scale_beyond_fp16_is_refused_by_name(name: str, rule: str | None, side: str) -> None:
    x = np.zeros((2, 70, 64), F)
    for huge in (1e30, 3.4e38, 1e8):
        x[1, 66] = huge
        with pytest.raises(ValueError, match=rf"{side} token 66 of row \(1,\): the scale .* does not fit"):
            encode(x, name, rule, side)


def test_the_largest_fp16_scale_is_kept() -> None:
    x = np.zeros((1, 64), F)
    x[0, 0] = 65504 * 127
    assert quantize(x, "q8_0")[1][0, 0] == 65504
    x[0, 0] = 65520 * 127
    with pytest.raises(ValueError, match=r"key token 0: the scale of q8_0, 6.552e\+04, does not fit"):
        quantize(x, "q8_0")


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_non_finite_values_are_refused_with_their_token(name: str, bad: float) -> None:
    x = np.ones((3, 65, 64), F)
    x[2, 64, 5] = bad
    with pytest.raises(ValueError, match=rf"value token 64 of row \(2,\): dim 5 is {bad}, not finite"):
        encode(x, name, side="value")
    with pytest.raises(ValueError, match="key token 64: dim 5"):
        encode(x[2].astype(np.float16), name)


@pytest.mark.parametrize("name", CODECS)
def test_float16_is_widened_exactly(name: str) -> None:
    x = np.random.default_rng(2).standard_normal((64, 64)).astype(np.float16)
    assert (encode(x, name) == encode(x.astype(F), name)).all()


@pytest.mark.parametrize("name", CODECS)
def test_powers_of_two_scale_through(name: str) -> None:
    x = np.random.default_rng(3).standard_normal((64, 128)).astype(F)
    codes, scales = quantize(x, name)
    for e in (-5, 7):
        moved, moved_scales = quantize(np.ldexp(x, e), name)
        assert (moved == codes).all()
        assert (moved_scales == np.ldexp(scales, e)).all()


def test_codes_do_not_depend_on_the_scale_rule() -> None:
    x = np.random.default_rng(4).standard_normal((64, 128)).astype(F)
    for name in ROTATED:
        if not CODECS[name].scale_rules:
            continue
        codes = [quantize(x, name, rule)[0] for rule in SCALE_RULES]
        if name in PROJECTED:  # the signs are of what the scale leaves
            codes = [each & ((1 << (CODECS[name].bits - 1)) - 1) for each in codes]
        assert all((each == codes[0]).all() for each in codes)
        assert (quantize(x, name)[1] == quantize(x, name, "norm")[1]).all()


def test_plain_codecs_match_ggml() -> None:
    quants = pytest.importorskip("gguf.quants")
    gguf = pytest.importorskip("gguf")
    x = np.random.default_rng(5).standard_normal((512, 128)).astype(F)
    for name in ("q8_0", "q4_0", "q5_0"):
        kind = gguf.GGMLQuantizationType[name.upper()]
        theirs = quants.dequantize(quants.quantize(x, kind), kind)
        ours = decode(encode(x, name), name, "key", 128)
        np.testing.assert_allclose(ours, theirs, rtol=1e-6)


def test_q4_0_takes_the_first_of_two_extremes() -> None:
    x = np.zeros((1, 64), F)
    x[0, [3, 9]] = 4, -4
    x[0, [40, 41]] = -4, 4
    codes, scales = quantize(x, "q4_0")
    assert scales[0].tolist() == [-0.5, 0.5]
    assert codes[0, [3, 9, 40, 41]].tolist() == [0, 15, 0, 15]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("tq5",), "codec 'tq5' is not one of exact, q8_0"),
        (("tq4", "best"), "scale 'best' is not one of stored, norm, mse, unbiased"),
        (("q8_0", "norm"), "q8_0 has no scale rules"),
        (("rq8_0", "norm"), "rq8_0 has no scale rules"),
        (("rq4_0", None, "key", "none", True), "rq4_0 has no scale rules, and so no search"),
        (("q5_0", None, "key", "tile"), "q5_0 is not rotated, and cannot be centred; center='tile'"),
        (("tq4", None, "key", "row"), "center 'row' is not one of none, mean, tile"),
        (("exact", "norm"), "exact has no scale rules"),
        (("tq4", None, "keys"), "side 'keys' is not one of key, value"),
    ],
)
def test_bad_options_are_refused(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        encode(np.zeros((64, 64), F), *arguments)


@pytest.mark.parametrize("name", ["exact", *CODECS])
def test_bad_arrays_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="head size 88 is not supported; allowed: 64, 80, .* 256 .*1, 12, 20 or 28"):
        encode(np.zeros((64, 88), F), name)
    with pytest.raises(ValueError, match="x is float64"):
        encode(np.zeros((64, 64)), name)
    with pytest.raises(ValueError, match="it needs"):
        encode(np.zeros(64, F), name)
