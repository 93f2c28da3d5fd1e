"""With `exact`, no mode of generation can tell the cache from transformers' own, in any family.

With `fused=False`, tokens and logits are DynamicCache's bit for bit. Fused, tokens are, and logits up to the order of
summation.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ..hf import helpers as h
from .families import ATTENTIONS, FAMILIES, Family, packed, stats, stock
from .modes import MODES, Run

TOLERANCE = 1e-4  # of logits: largest difference over largest value


def _in_default_run(family: int, attention: str, mode: int) -> bool:
    """A diagonal: each family in several modes, each mode in several families, and all greedy by default."""
    steps = {"default": (0, 5), "kvpack": (3,), "eager": (9,)}[attention]
    return (mode == 0 and attention == "default") or any((family + step) % len(MODES) == mode for step in steps)


CASES = [
    pytest.param(
        name,
        attention,
        mode,
        id=f"{name}-{attention}-{mode}",
        marks=() if _in_default_run(i, attention, j) else pytest.mark.full,
    )
    for i, (name, family) in enumerate(FAMILIES.items())
    for attention in family.attentions
    for j, mode in enumerate(MODES)
]


def is_fused(family: Family, attention: str) -> bool:
    return family.fused if attention == "default" else attention == "kvpack"


@pytest.mark.filterwarnings(h.DECODED)
@pytest.mark.parametrize(("name", "attention", "mode"), CASES)
def test_equal_to_the_stock_cache(name: str, attention: str, mode: str) -> None:
    family, ways = FAMILIES[name], MODES[mode]

    def run(make: Any) -> tuple[torch.Tensor, list[torch.Tensor], list[Any]]:
        this = Run(name, make, attention)
        return *ways(this), this.caches

    if mode in family.refused:
        for make in (stock, packed):
            with pytest.raises(ValueError, match="not supported with stateful models"):
                run(make)
        return
    want, want_logits, _ = run(stock)
    got, logits, _ = run(lambda config: packed(config, fused=False))
    assert torch.equal(got, want)
    assert len(logits) == len(want_logits)
    assert all(torch.equal(x, y) for x, y in zip(logits, want_logits, strict=True))
    got, logits, caches = run(packed)
    assert torch.equal(got, want)
    assert all(h.error(x, y) <= TOLERANCE for x, y in zip(logits, want_logits, strict=True))
    layers = [layer for cache in caches for layer in stats(cache)]
    assert {layer.layer for layer in layers} == set(family.packed)
    assert all(layer.tokens_packed for layer in layers)
    assert any(layer.packed_tokens_read for layer in layers)
    if is_fused(family, attention):
        assert any(layer.fused_calls for layer in layers)
        assert not any(layer.fallback_calls for layer in layers)
    else:
        assert not any(layer.fused_calls for layer in layers)


def test_the_default_run_has_every_mode_and_attention() -> None:
    """And every family, under each attention that it can be given."""
    kept = [case.values for case in CASES if not case.marks]
    assert {mode for _, _, mode in kept} == set(MODES)
    assert {(name, attention) for name, attention, _ in kept} == {
        (name, attention) for name, family in FAMILIES.items() for attention in family.attentions
    }
    assert set(ATTENTIONS) == {attention for _, attention, _ in kept}
