"""How figures are written, in tables of every kind."""

from __future__ import annotations

from .metrics import Interval


def figure(x: float, digits: int = 2) -> str:
    """`digits` significant digits without an exponent."""
    if x != x:
        return "-"
    if x == 0:
        return "0"
    return f"{float(f'{x:.{digits}g}'):f}".rstrip("0").rstrip(".") if abs(x) < 1e15 else f"{x:.1e}"


def _with(value: str, half: float, reach: str) -> str:
    return value if half != half else f"{value} ± {reach}"


def kld(interval: Interval) -> str:
    """A divergence with half its interval, if it has one."""
    return _with(figure(interval.value), interval.half, figure(interval.half, 1))


def percent(interval: Interval) -> str:
    """A share as a percentage, with half its interval."""
    return _with(f"{interval.value * 100:.1f}", interval.half, f"{interval.half * 100:.1f}")


def number(interval: Interval, digits: int = 2) -> str:
    """A figure with half its interval, both to so many decimals."""
    return _with(f"{interval.value:.{digits}f}", interval.half, f"{interval.half:.{digits}f}")
