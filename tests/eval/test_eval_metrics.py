"""Figures and intervals on synthetic data whose truth is known."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

from kvpack.eval import metrics
from kvpack.eval.measure import _score, summary
from kvpack.eval.metrics import TokenScores


def groups_of(size: int, count: int) -> metrics.Clusters:
    return metrics.Clusters(np.repeat(np.arange(count), size), count, "document")


def test_kld_nll_and_agreement_of_known_distributions() -> None:
    p = torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.1, 0.8]], dtype=torch.float64)
    q = torch.tensor([[0.25, 0.5, 0.25], [0.1, 0.2, 0.7]], dtype=torch.float64)
    logits = q.log() + 3.0  # any constant: these are logits
    nll, exact, kld, same = _score(logits, p.log(), torch.tensor([0, 2]))
    want = [0.5 * math.log(2) - 0.25 * math.log(2), 0.1 * math.log(0.5) + 0.8 * math.log(8 / 7)]
    assert kld.tolist() == pytest.approx(want)
    assert nll.tolist() == pytest.approx([-math.log(0.25), -math.log(0.7)])
    assert exact.tolist() == pytest.approx([-math.log(0.5), -math.log(0.8)])
    assert same.tolist() == [False, True]


def test_student_t_against_the_tables() -> None:
    for freedom, want in ((1, 12.7062), (2, 4.3027), (3, 3.1824), (5, 2.5706), (10, 2.2281), (100, 1.9840)):
        assert metrics.student_t(0.95, freedom) == pytest.approx(want, rel=5e-3)


@pytest.mark.parametrize("spread", [0.0, 2.0])
def test_mean_interval_covers_the_truth(spread: float) -> None:
    """95 % intervals hold the true mean about 95 times in 100, however much documents differ."""
    random = np.random.default_rng(0)
    groups, hits, runs = groups_of(50, 8), 0, 400
    for _ in range(runs):
        x = 1.0 + np.repeat(spread * random.normal(size=8), 50) + random.normal(size=400)
        interval = metrics.mean_interval(x, groups)
        hits += interval.low <= 1.0 <= interval.high
    assert 0.91 <= hits / runs <= 0.985


def test_ignoring_clusters_would_be_wrong() -> None:
    random = np.random.default_rng(1)
    x = np.repeat(2.0 * random.normal(size=8), 50) + random.normal(size=400)
    alone = metrics.Clusters(np.arange(400), 400, "token")
    assert metrics.mean_interval(x, groups_of(50, 8)).half > 3 * metrics.mean_interval(x, alone).half


def test_percentile_intervals_cover_the_truth() -> None:
    random = np.random.default_rng(2)
    groups = metrics.Clusters(np.arange(600) // 10, 60, "document")
    hits = np.zeros(2)
    for _ in range(60):
        x = random.exponential(size=600)
        median, p90 = metrics.percentile_intervals(x, groups, (50, 90))
        hits += [median.low <= math.log(2) <= median.high, p90.low <= math.log(10) <= p90.high]
    assert (hits >= 51).all()


def test_share_interval_is_open_at_the_ends() -> None:
    groups = groups_of(50, 8)
    all_same = metrics.share_interval(np.ones(400, bool), groups)
    assert all_same.value == 1.0
    assert all_same.high == 1.0
    assert 0.97 < all_same.low < 1.0
    half = metrics.share_interval(np.arange(400) % 2 == 0, groups)
    assert half.low < 0.5 < half.high
    assert half.half < 0.08


def test_share_interval_widens_with_clusters() -> None:
    same = np.repeat(np.arange(8) % 2 == 0, 50)  # a document agrees in all tokens or in none
    assert metrics.share_interval(same, groups_of(50, 8)).half > 0.3


def test_clusters_are_documents_or_runs() -> None:
    window = np.repeat(np.arange(6), 100)
    assert metrics.clusters(window, window).kind == "document"
    assert metrics.clusters(window, window).count == 6
    few = metrics.clusters(window[:300] // 3, window[:300])
    assert few.count == 6
    assert few.kind.startswith("run of")
    assert len(np.unique(few.index[:100])) == 2


def test_ratio_is_paired() -> None:
    """The text's own spread cancels: a constant loss of 0.01 nats has a narrow interval."""
    random = np.random.default_rng(3)
    exact = random.exponential(3.0, 600)
    scores = TokenScores(
        nll=exact + 0.01 + 0.001 * random.normal(size=600),
        window=np.repeat(np.arange(6), 100),
        document=np.repeat(np.arange(6), 100),
        nll_exact=exact,
        kld=np.full(600, 0.02),
        same=np.ones(600, bool),
    )
    figures = summary(scores, metrics.clusters(scores.document, scores.window))
    assert figures["ppl_ratio"].value == pytest.approx(math.exp(0.01), abs=2e-4)
    assert figures["ppl_ratio"].half < 1e-3 < figures["ppl"].half
    assert figures["kld"].value == pytest.approx(0.02)
    assert figures["kld_max"] == pytest.approx(0.02)


def test_too_little_for_an_interval() -> None:
    one = metrics.Clusters(np.zeros(10, np.int64), 1, "document")
    assert math.isnan(metrics.mean_interval(np.arange(10.0), one).low)
    assert math.isnan(metrics.percentile_intervals(np.arange(10.0), one, (50,))[0].high)


def test_jsonable_is_strict() -> None:
    value = metrics.jsonable({"a": metrics.Interval(1.0, math.nan, math.inf), 2: (1, None)})
    assert json.loads(json.dumps(value, allow_nan=False)) == {
        "a": {"value": 1.0, "low": None, "high": None},
        "2": [1, None],
    }


def test_perplexity_overflows_to_infinity() -> None:
    assert metrics.perplexity_interval(np.full(10, 1e4), groups_of(5, 2)).value == math.inf
