"""Under real codecs, a model attends to what the codecs make of its tokens, and to nothing else.

Every mode of generation against `oracle.py`: stock layers that keep all tokens as they came, and give attention
`codec.decode(codec.encode(...))` of those that are in tiles. Dense attention over decoded tiles (`fused=False`) is the
oracle's, bit for bit; fused attention, at precision "high", within FUSED. Left-padded rows, which the oracle does not
know, are compared fused against dense.
"""

from __future__ import annotations

from statistics import median
from typing import Any

import pytest
import torch

from ..hf import helpers as h
from .families import FAMILIES, packed, stats
from .modes import MODES, Run
from .oracle import oracle

# Of logits, largest difference over largest value, at half of the steps or more. It is 1e-4 until another tile is
# packed, whose codes the last bits of its tokens may flip; so may the choice of an expert, for a step.
FUSED = 1e-3
CODECS = (
    ("tq4:center=tile", "tq3:center=mean"),
    ("q8_0", "q4_0"),
    ("tcq3:center=none", "kivi2"),
    ("rq4_0:center=tile", "fp8"),
)
PADDED = frozenset({"left-padded", "left-padded beam", "chunked prefill, padded"})

CASES = [
    pytest.param(
        name,
        mode,
        CODECS[(i + j) % len(CODECS)],
        id=f"{name}-{mode}",
        marks=() if (i - j) % len(MODES) in (0, 8) else pytest.mark.full,
    )
    for i, (name, family) in enumerate(FAMILIES.items())
    for j, mode in enumerate(MODES)
    if mode not in family.refused
]


@pytest.mark.filterwarnings(h.DECODED)
@pytest.mark.parametrize(("name", "mode", "codecs"), CASES)
def test_attention_over_what_codecs_make(name: str, mode: str, codecs: tuple[str, str]) -> None:
    family = FAMILIES[name]
    attention = "default" if family.fused or not family.enables else "kvpack"
    key, value = codecs

    def run(make: Any) -> tuple[torch.Tensor, list[torch.Tensor], list[Any]]:
        this = Run(name, make, attention)
        return *MODES[mode](this), this.caches

    def ours(**options: Any) -> Any:
        return lambda config: packed(config, key=key, value=value, **options)

    got, logits, _ = run(ours(fused=False))
    want, want_logits = got, logits
    if mode not in PADDED:
        want, want_logits, _ = run(lambda config: oracle(name, config, key, value, window=0, sinks=4))
        assert torch.equal(got, want)
        assert all(torch.equal(x, y) for x, y in zip(logits, want_logits, strict=True))
    got, logits, caches = run(ours(precision="high"))
    assert torch.equal(got, want)
    assert median(h.error(x, y) for x, y in zip(logits, want_logits, strict=True)) <= FUSED
    layers = [layer for cache in caches for layer in stats(cache)]
    assert any(layer.packed_tokens_read for layer in layers)
    if family.fused or family.enables:
        assert any(layer.fused_calls for layer in layers)
        assert not any(layer.fallback_calls for layer in layers)


def test_the_codecs_matter() -> None:
    """The comparison above could tell: another codec is another model."""

    def logits(codec: str) -> torch.Tensor:
        return MODES["greedy"](Run("llama", lambda config: packed(config, key=codec)))[1][1]

    assert h.error(logits("tq4"), logits("tq3")) > 10 * FUSED
