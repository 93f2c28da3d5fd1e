"""Counters of a packed layer, and the report of every layer that `Cache.stats()` makes."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Counters:
    """What a packed layer counts as it runs, in graphs of torch.compile too."""

    packed_tokens_read: int = 0
    fused_calls: int = 0
    fallback_calls: dict[str, int] = field(default_factory=dict)
    nonfinite_replaced: int = 0
    late_padding: int = 0


@dataclass(frozen=True)
class LayerStats:
    """One layer, since the cache was made or reset.

    layer: index in the model.
    type: what transformers calls it: "full_attention", "sliding_attention", ...
    packed: whether kvpack holds it. The stock class serves the others, with nothing to count.
    why: why it is not packed; "" if it is.
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
    type: str
    packed: bool
    why: str
    key: str = ""
    value: str = ""
    tokens_packed: int = 0
    packed_tokens_read: int = 0
    fused_calls: int = 0
    fallback_calls: dict[str, int] = field(default_factory=dict)
    nonfinite_replaced: int = 0
    late_padding: int = 0
    value_tiles_met: int = 0
    value_tiles_unread: int = 0
