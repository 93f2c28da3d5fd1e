"""The window rule: which tokens a call finds packed.

    position   0 ...            ... n ...              (no padding)
               [sinks][ packed tiles ][ window ][ the call's own tokens ]
                exact   64 tokens each   exact    exact

A call attends to sinks, packed tiles and window as they stood before it, and to its own tokens exact. After
it, whole tiles leave the window for as long as it holds at least `window + 64` tokens. Without crops, this
gives the closed form below, however the tokens were divided into calls; the window then holds `window` to
`window + 63` tokens.
"""

from .packing import TILE

__all__ = ["packed_tokens"]


def packed_tokens(start: int, window: int, sinks: int) -> int:
    """Packed tokens that a call finds which starts at position `start` (the length of the cache before it).

    window, sinks: as configured. All are counts of tokens. ValueError if one is negative.
    """
    for name, count in (("start", start), ("window", window), ("sinks", sinks)):
        if count < 0:
            raise ValueError(f"{name} is {count}; it cannot be negative")
    return TILE * (max(0, start - sinks - window) // TILE)
