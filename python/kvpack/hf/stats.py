"""Counters of a packed layer, and the report that `Cache.stats()` makes of them."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Counters:
    """What a layer counts as it runs. Traced code (torch.compile) does not count calls."""

    packed_tokens_read: int = 0
    fused_calls: int = 0
    fallback_calls: dict[str, int] = field(default_factory=dict)
    nonfinite_replaced: int = 0
    late_padding: int = 0


@dataclass(frozen=True)
class LayerStats:
    """One packed layer, since the cache was made or reset.

    layer: index in the model.
    key, value: codecs.
    tokens_packed: packed tokens it now holds, per row.
    packed_tokens_read: packed tokens that attention read (fused or decoded), per row, summed over calls.
    fused_calls: attention calls that read packed bits.
    fallback_calls: calls that decoded to dense tensors, by reason: the operation that asked, "fused=False",
        "gradients", "dropout", ...
    nonfinite_replaced: NaN and Inf replaced by 0 under KVPACK_NONFINITE=zero.
    late_padding: padded positions that became known only after they were packed or made sinks.
    value_tiles_met, value_tiles_unread: with `sparse_values`, tiles that groups of up to four query rows of a KV head
        met in fused calls, and those among them whose values were left unread.
    """

    layer: int
    key: str
    value: str
    tokens_packed: int
    packed_tokens_read: int
    fused_calls: int
    fallback_calls: dict[str, int]
    nonfinite_replaced: int
    late_padding: int
    value_tiles_met: int
    value_tiles_unread: int
