"""Attention in float64 against a naive softmax, token by token; the position rule and the window rule."""

from typing import Any

import numpy as np
import pytest

from kvpack.reference import attend, packed_tokens, positions, sink_start

B, HQ, HKV, DK, DV = 2, 4, 2, 8, 6


def tokens(n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.standard_normal((B, HKV, n, DK)), rng.standard_normal((B, HKV, n, DV))


def queries(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((B, HQ, n, DK))


def naive(query: np.ndarray, parts: list[Any], **o: Any) -> np.ndarray:
    """One sum per query, with no shift of the maximum."""
    sinks, packed, exact = parts
    s, p, e = (0 if part is None else part[0].shape[2] for part in parts)
    n = query.shape[2]
    out = np.zeros((B, HQ, n, DV))
    for b in range(B):
        pad, start = o.get("rows", np.zeros((B, 2), int))[b]
        for h in range(HQ):
            for i in range(n):
                top, bottom = np.zeros(DV), 0.0
                if o.get("sink_logits") is not None:
                    bottom += np.exp(o["sink_logits"][h])
                for t in range(s + p + e):
                    if t < s:
                        part, index, position = sinks, t, start + t
                    else:
                        part, index = (packed, t - s) if t - s < p else (exact, t - s - p)
                        position = t - s if t - s < start else t
                    if position < pad:
                        continue
                    if o.get("causal") and part is exact and index >= e - n + i + 1:
                        continue
                    key, value = part[0][b, h // (HQ // HKV), index], part[1][b, h // (HQ // HKV), index]
                    score = o["scale"] * (query[b, h, i] @ key)
                    if o.get("softcap"):
                        score = o["softcap"] * np.tanh(score / o["softcap"])
                    mask = o.get("mask")
                    if mask is not None:
                        entry = np.broadcast_to(mask, (B, HQ, n, s + p + e))[b, h, i, position]
                        if mask.dtype == bool and not entry:
                            continue
                        score += 0 if mask.dtype == bool else entry
                    top += np.exp(score) * value
                    bottom += np.exp(score)
                out[b, h, i] = top / bottom if bottom else 0
    return out


MASK = np.random.default_rng(7).random((B, HQ, 3, 18)) < 0.7
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"causal": True},
    "softcap": {"softcap": 0.7, "causal": True},
    "bool mask": {"mask": MASK},
    "mask of rows": {"mask": MASK[:, :1, :1], "causal": True},
    "mask of queries": {"mask": MASK[:1, :1], "softcap": 2.0},
    "additive mask": {"mask": np.where(MASK, 0.3, -np.inf)},
    "soft additive mask": {"mask": np.random.default_rng(8).standard_normal((1, HQ, 3, 18)).astype(np.float32)},
    "sink logits": {"sink_logits": np.array([0.5, -2.0, 3.0, -np.inf]), "causal": True},
    "padding": {"rows": np.array([[0, 0], [5, 5]]), "causal": True},
    "padding and mask": {"rows": np.array([[2, 2], [6, 4]]), "mask": MASK, "causal": True},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("sizes", [(4, 9, 5), (0, 11, 7), (4, 0, 14), (4, 14, 0), (0, 0, 18)])
def test_attend_equals_the_naive_sum(case: str, sizes: tuple[int, int, int]) -> None:
    options = {"scale": 0.3, **CASES[case]}
    parts = [tokens(n, seed) if n else None for seed, n in enumerate(sizes)]
    got = attend(queries(3), sinks=parts[0], packed=parts[1], exact=parts[2], **options)
    assert got.dtype == np.float64
    np.testing.assert_allclose(got, naive(queries(3), parts, **options), atol=1e-13)


def test_parts_only_say_where_tokens_are_stored() -> None:
    keys, values = tokens(20, 1)
    whole = attend(queries(2), scale=0.5, exact=(keys, values), causal=True)
    cut: dict[str, Any] = {
        name: (keys[:, :, a:b], values[:, :, a:b])
        for name, a, b in (("sinks", 0, 4), ("packed", 4, 12), ("exact", 12, 20))
    }
    np.testing.assert_allclose(attend(queries(2), scale=0.5, causal=True, **cut), whole, atol=1e-14)


def test_left_padding_leaves_no_trace() -> None:
    keys, values = tokens(15, 2)
    query = queries(15, 3)
    plain = attend(query, scale=0.4, exact=(keys, values), causal=True)

    def padded(x: np.ndarray) -> np.ndarray:
        return np.concatenate((np.full_like(x[:, :, :6], 1e3), x), axis=2)

    keys, values, query = padded(keys), padded(values), padded(query)
    options: dict[str, Any] = {"scale": 0.4, "causal": True, "rows": np.full((B, 2), 6)}
    first = attend(query, exact=(keys, values), **options)
    np.testing.assert_allclose(first[:, :, 6:], plain, atol=1e-14)
    assert (first[:, :, :6] == 0).all()  # padding attends to nothing

    stream = np.delete(np.arange(21), range(6, 10))
    parts: dict[str, Any] = {
        name: (keys[:, :, where], values[:, :, where])
        for name, where in (("sinks", np.arange(6, 10)), ("packed", stream[:10]), ("exact", stream[10:]))
    }
    later = attend(query[:, :, -3:], **parts, **options)
    np.testing.assert_allclose(later, plain[:, :, -3:], atol=1e-14)


def test_scores_are_shift_invariant_and_do_not_overflow() -> None:
    keys, values = tokens(10, 4)
    query = queries(2, 5)
    plain = attend(query, scale=1.0, exact=(keys, values))
    shift = np.random.default_rng(6).standard_normal((B, HKV, 1, DK))
    np.testing.assert_allclose(attend(query, scale=1.0, exact=(keys + shift, values)), plain, atol=1e-13)
    lifted = np.full((1, 1, 1, 10), 1e5)
    np.testing.assert_allclose(attend(query, scale=1.0, exact=(keys, values), mask=lifted), plain, atol=1e-9)
    assert np.isfinite(attend(query, scale=1e6, exact=(keys, values))).all()


def test_nothing_to_attend_to_gives_zeros() -> None:
    part = tokens(10, 4)
    mask = np.ones((B, 1, 2, 10), bool)
    mask[1, :, 0] = False
    for form in (mask, np.where(mask, 0.0, -np.inf)):
        for sink_logits in (None, np.full(HQ, 1.0)):
            out = attend(queries(2), scale=1.0, exact=part, mask=form, sink_logits=sink_logits)
            assert (out[1, :, 0] == 0).all()
            assert (out[0] != 0).all()
    assert (attend(queries(2), scale=1.0, exact=tokens(0, 0)) == 0).all()
    assert attend(queries(0), scale=1.0, exact=part).shape == (B, HQ, 0, DV)


def test_bad_arguments_are_refused() -> None:
    part = tokens(10, 4)
    with pytest.raises(ValueError, match="give at least one"):
        attend(queries(2), scale=1.0)
    with pytest.raises(ValueError, match="4 query heads are not a multiple of 3 KV heads"):
        attend(queries(2), scale=1.0, exact=(np.zeros((B, 3, 4, DK)), np.zeros((B, 3, 4, DV))))
    with pytest.raises(ValueError, match=r"mask of shape \(2, 1, 2, 9\) does not fit \[2, 4, 2, 10\]"):
        attend(queries(2), scale=1.0, exact=part, mask=np.ones((2, 1, 2, 9), bool))
    with pytest.raises(ValueError, match="mask is int64"):
        attend(queries(2), scale=1.0, exact=part, mask=np.ones((2, 1, 2, 10), np.int64))
    with pytest.raises(ValueError, match="sink_start 7 lies outside a stream of 6 tokens"):
        positions(4, 6, 0, 7, 7)


def test_positions() -> None:
    where, real = positions(0, 3, 2)
    assert where.tolist() == [0, 1, 2, 3, 4]
    assert real.all()
    where, real = positions(2, 3, 2, 0, 0)
    assert where.tolist() == [0, 1, 2, 3, 4, 5, 6]
    where, real = positions(2, 3, 2, 4, 4)
    assert where.tolist() == [4, 5, 0, 1, 2, 3, 6]
    assert real.tolist() == [True, True, False, False, False, False, True]
    where, real = positions(4, 6, 5, 5, 3)  # the first call had 7 tokens, 5 of them padding
    assert where.tolist() == [3, 4, 5, 6, 0, 1, 2, *range(7, 15)]
    assert real.tolist() == [False, False, True, True, *[False] * 3, *[True] * 8]
    for sinks, packed, exact, pad, start in [(4, 64, 9, 10, 10), (4, 0, 4, 3, 3), (0, 64, 0, 64, 64)]:
        where, real = positions(sinks, packed, exact, pad, start)
        assert sorted(where.tolist()) == list(range(sinks + packed + exact))
        assert real.sum() == sinks + packed + exact - pad


def test_sink_start() -> None:
    assert sink_start(0, 100, 4) == 0
    assert sink_start(10, 100, 4) == 10
    assert sink_start(98, 100, 4) == 96
    assert sink_start(2, 3, 4) == 0


@pytest.mark.parametrize("sinks", [0, 4, 70])
@pytest.mark.parametrize("window", [0, 1, 64, 100, 128])
def test_packed_tokens_is_what_packing_after_each_call_leaves(window: int, sinks: int) -> None:
    rng = np.random.default_rng(window + sinks)
    for _ in range(20):
        start = packed = 0
        for _ in range(30):
            assert packed_tokens(start, window, sinks) == packed
            start += int(rng.choice([1, 1, 1, 2, 63, 64, 65, 200]))
            while start - min(start, sinks) - packed >= window + 64:
                packed += 64
            held = start - min(start, sinks) - packed
            assert held < window + 64
            assert packed == 0 or held >= window


def test_packed_tokens_literal() -> None:
    assert packed_tokens(0, 128, 4) == 0
    assert packed_tokens(195, 128, 4) == 0
    assert packed_tokens(196, 128, 4) == 64
    assert packed_tokens(1000, 128, 4) == 832
    assert packed_tokens(1000, 0, 0) == 960
    with pytest.raises(ValueError, match="window is -1"):
        packed_tokens(10, -1, 4)
