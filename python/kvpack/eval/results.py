"""What a measurement returns: frozen dataclasses that say how each figure came about, and turn into JSON."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .metrics import Interval, jsonable


@dataclass(frozen=True, kw_only=True)
class Setting:
    """How a measurement was made.

    key, value: codecs ("" with the exact cache; of a policy, those of the layers that it does not name); policy:
    its label ("" without one); window, sinks: tokens kept exact (`fake`: window 0).
    prompt, chunk: tokens of the first and of each later call. context: tokens of the longest window.
    tokens: scored tokens; coded_queries: those among all queries that attended to coded tokens.
    cache_bytes: of the real cache at the end of the last window, everything included (None: not measured);
    dense_bytes: of the stock cache holding the same tokens in the model's dtype.
    """

    mode: str
    key: str
    value: str
    window: int
    sinks: int
    fused: bool
    prompt: int
    chunk: int
    model: str
    dtype: str
    text: str
    windows: int
    context: int
    tokens: int
    coded_queries: int
    clusters: int
    cluster_kind: str
    confidence: float
    cache_bytes: int | None
    dense_bytes: int | None
    seconds: float
    policy: str = ""

    @property
    def label(self) -> str:
        """Codec, or key/value codecs where they differ; a policy's label; "exact" for the stock cache."""
        if self.policy or not self.key:
            return self.policy or "exact"
        return self.key if self.key == self.value else f"{self.key}/{self.value}"

    @property
    def compression(self) -> float | None:
        """Stock cache over real cache, in bytes."""
        return self.dense_bytes / self.cache_bytes if self.cache_bytes and self.dense_bytes else None

    def to_json(self) -> dict[str, Any]:
        """Plain dicts, strings and numbers, label and compression too; what is not finite is None."""
        return {"label": self.label, "compression": self.compression, **jsonable(self)}


@dataclass(frozen=True, kw_only=True)
class Perplexity(Setting):
    """exp of the mean negative log-likelihood of the scored tokens."""

    ppl: Interval


@dataclass(frozen=True, kw_only=True)
class Divergence(Setting):
    """Against the same model with the exact cache, on the same tokens.

    kld*: nats per token. top1: share 0..1 of tokens with the same most likely next token.
    ppl_ratio: ppl / ppl_exact, its interval paired by token.
    """

    kld: Interval
    kld_median: Interval
    kld_p90: Interval
    kld_p99: Interval
    kld_max: float
    top1: Interval
    ppl: Interval
    ppl_exact: Interval
    ppl_ratio: Interval


def interval_from(data: dict[str, Any]) -> Interval:
    """The inverse of `jsonable` for an Interval."""
    nan = float("nan")
    return Interval(*(nan if data[name] is None else float(data[name]) for name in ("value", "low", "high")))


def divergence_from(data: dict[str, Any]) -> Divergence:
    """A Divergence from what `to_json` made; keys that are none of its fields are ignored."""
    fields = {name: data[name] for name in Divergence.__dataclass_fields__ if name != "policy"}
    fields["policy"] = data.get("policy", "")
    for name, value in fields.items():
        if isinstance(value, dict):
            fields[name] = interval_from(value)
    if fields["kld_max"] is None:
        fields["kld_max"] = float("nan")
    return Divergence(**fields)
