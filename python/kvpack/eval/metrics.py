"""Divergence from the exact cache, per token and in sum, with confidence intervals. NumPy only.

Per scored token, p being the exact model's distribution and q the one under the measured cache:

    kld     sum_v p_v (ln p_v - ln q_v)      nats; the sensitive figure (llama.cpp's --kl-divergence)
    top-1   argmax p == argmax q
    ratio   exp(mean(nll_q - nll_p))         paired by token, so that the text's own spread cancels

Intervals are 95 % by default and *clustered*: tokens of one document are not independent. With at least
MIN_CLUSTERS documents these are the clusters, otherwise runs of BLOCK consecutive scored tokens are, which
allows for the short-range dependence only: the result says which.

* means: cluster-robust standard error of a ratio of sums, Student t with clusters - 1 degrees of freedom.
* top-1: Wilson interval with the number of tokens divided by the design effect (it stays right at 100 %).
* percentiles: bootstrap over clusters, RESAMPLES times, percentile interval, fixed seed.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

F64 = NDArray[np.float64]
I64 = NDArray[np.int64]

MIN_CLUSTERS = 5
BLOCK = 64
RESAMPLES = 1000


@dataclass(frozen=True)
class Interval:
    """A figure with the ends of its confidence interval; they are NaN where there is too little to tell."""

    value: float
    low: float
    high: float

    @property
    def half(self) -> float:
        """Half the interval's length."""
        return (self.high - self.low) / 2

    def map(self, f: Any) -> Interval:
        """A monotonically growing function of the figure and of both ends."""
        return Interval(f(self.value), f(self.low), f(self.high))


@dataclass(frozen=True)
class TokenScores:
    """Per scored token, all [tokens]: negative log-likelihoods (nats), KLD, agreement, window and its
    document.

    `nll_exact`, `kld` and `same` are empty where nothing was compared.
    """

    nll: F64
    window: I64
    document: I64
    nll_exact: F64
    kld: F64
    same: NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.nll)


@dataclass(frozen=True)
class Clusters:
    """Cluster number of every token, 0 .. count-1, and what a cluster is."""

    index: I64
    count: int
    kind: str


def clusters(document: I64, window: I64) -> Clusters:
    """Documents if there are at least MIN_CLUSTERS, else runs of BLOCK consecutive tokens of a window."""
    names, index = np.unique(document, return_inverse=True)
    if len(names) >= MIN_CLUSTERS:
        return Clusters(index.astype(np.int64), len(names), "document")
    blocks = np.empty(len(window), np.int64)
    number = 0
    for name in np.unique(window):
        rows = np.flatnonzero(window == name)
        blocks[rows] = number + np.arange(len(rows)) // BLOCK
        number = int(blocks[rows[-1]]) + 1
    return Clusters(blocks, number, f"run of {BLOCK} tokens")


def student_t(confidence: float, freedom: int) -> float:
    """Two-sided quantile of Student's t: exact for 1 and 2 degrees of freedom, else within 0.5 % (Hill 1970)."""
    p = (1 + confidence) / 2
    if freedom == 1:
        return math.tan(math.pi * (p - 0.5))
    if freedom == 2:
        a = 2 * p - 1
        return a * math.sqrt(2 / (1 - a * a))
    z = NormalDist().inv_cdf(p)
    g1 = (z**3 + z) / 4
    g2 = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    g3 = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    g4 = (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160
    return z + g1 / freedom + g2 / freedom**2 + g3 / freedom**3 + g4 / freedom**4


def _standard_error(x: F64, groups: Clusters) -> float:
    if groups.count < 2:
        return math.nan
    sums = np.bincount(groups.index, weights=x - x.mean(), minlength=groups.count)
    return float(math.sqrt((sums**2).sum() * groups.count / (groups.count - 1)) / len(x))


def mean_interval(x: F64, groups: Clusters, confidence: float = 0.95) -> Interval:
    """The mean over tokens with its clustered interval."""
    mean, error = float(x.mean()), _standard_error(x, groups)
    reach = student_t(confidence, groups.count - 1) * error if groups.count > 1 else math.nan
    return Interval(mean, mean - reach, mean + reach)


def ratio_interval(x: F64, y: F64, groups: Clusters, confidence: float = 0.95) -> Interval:
    """mean(x) / mean(y) of paired figures, its interval by linearization: of x - ratio y, over mean(y)."""
    ratio = float(x.mean() / y.mean())
    half = mean_interval((x - ratio * y) / y.mean(), groups, confidence).half
    return Interval(ratio, ratio - half, ratio + half)


def share_interval(same: NDArray[np.bool_], groups: Clusters, confidence: float = 0.95) -> Interval:
    """A share of tokens, 0..1: Wilson interval at the effective number of tokens."""
    x = same.astype(np.float64)
    n, p = len(x), float(x.mean())
    if groups.count < 2:
        return Interval(p, math.nan, math.nan)
    binomial = p * (1 - p) / n
    effect = max(1.0, _standard_error(x, groups) ** 2 / binomial) if binomial > 0 else 1.0
    n_effective = n / effect
    z = student_t(confidence, groups.count - 1)
    middle = (p + z * z / (2 * n_effective)) / (1 + z * z / n_effective)
    reach = z / (1 + z * z / n_effective) * math.sqrt(p * (1 - p) / n_effective + (z / (2 * n_effective)) ** 2)
    return Interval(p, max(0.0, middle - reach), min(1.0, middle + reach))


def percentile_intervals(
    x: F64, groups: Clusters, percents: tuple[float, ...], confidence: float = 0.95
) -> list[Interval]:
    """Percentiles over tokens, each with a cluster bootstrap interval."""
    order = np.argsort(x, kind="stable")
    ordered, index = x[order], groups.index[order]
    values = [float(np.percentile(x, percent)) for percent in percents]
    if groups.count < 2:
        return [Interval(value, math.nan, math.nan) for value in values]
    random = np.random.default_rng(0)
    drawn = np.empty((RESAMPLES, len(percents)))
    share = np.array(percents) / 100
    for i in range(RESAMPLES):
        times = np.bincount(random.integers(0, groups.count, groups.count), minlength=groups.count)
        total = np.cumsum(times[index])
        at = np.searchsorted(total, np.maximum(share * total[-1], 1e-9))
        drawn[i] = ordered[np.minimum(at, len(x) - 1)]
    tail = (1 - confidence) / 2 * 100
    low, high = np.percentile(drawn, [tail, 100 - tail], axis=0)
    return [
        Interval(value, min(float(a), value), max(float(b), value))
        for value, a, b in zip(values, low, high, strict=True)
    ]


def perplexity_interval(nll: F64, groups: Clusters, confidence: float = 0.95) -> Interval:
    """exp of the mean negative log-likelihood; infinite where that overflows."""
    return mean_interval(nll, groups, confidence).map(_exp)


def _exp(x: float) -> float:
    try:
        return math.exp(x)
    except OverflowError:
        return math.inf


def jsonable(x: Any) -> Any:
    """Dataclasses to dicts, NaN and infinities to null, through lists and dicts: what json.dumps takes
    strictly.
    """
    if hasattr(x, "__dataclass_fields__") and not isinstance(x, type):
        return jsonable(asdict(x))
    if isinstance(x, dict):
        return {str(key): jsonable(value) for key, value in x.items()}
    if isinstance(x, (list, tuple)):
        return [jsonable(value) for value in x]
    if isinstance(x, float) and not math.isfinite(x):
        return None
    return x
