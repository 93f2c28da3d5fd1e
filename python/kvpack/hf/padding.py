"""Left padding: reading it from masks, and the order of tokens it leads to.

Row b has `pads[b]` padded positions, then real tokens. Its sinks sit at `sink_start[b]`, so that they are
real tokens; all other tokens form its *stream*, in the order of their positions:

    position      0 1 2 3 4 5 6 7 8 ...        pad = 3, 4 sinks, sink_start = 3
    row           p p p S S S S t t ...
    sinks               0 1 2 3
    stream        0 1 2         3 4 ...        (the padded ones are stored as zeros)

Stream index i sits at position i if i < sink_start, else at i + sinks.
"""

from __future__ import annotations

import torch
from torch import Tensor

_LARGE = -1.0e9  # an additive mask of this or below hides a position (so do -inf and the dtype's minimum)


def four_dims(mask: Tensor) -> Tensor:
    """The mask with its leading dims of size 1 written out: [B or 1, heads or 1, q or 1, positions]."""
    return mask if mask.dim() == 4 else mask[(None,) * (4 - mask.dim())]


def visible(mask: Tensor) -> Tensor:
    """Boolean form of a boolean or additive mask: what is not hidden."""
    if mask.dtype == torch.bool:
        return mask
    return mask > max(torch.finfo(mask.dtype).min / 2, _LARGE)


def _leading(seen: Tensor) -> Tensor:
    """Per row of the boolean seen [B, L], the number of leading False, int64 [B]."""
    if seen.shape[-1] == 0:
        return torch.zeros(seen.shape[0], dtype=torch.int64, device=seen.device)
    first = seen.to(torch.int8).argmax(dim=-1)
    return torch.where(seen.any(dim=-1), first, seen.shape[-1])


def from_attention_mask(mask: Tensor) -> Tensor:
    """Padded positions per row, int64 [B], of a tokenizer's mask [B, L]: its leading zeros."""
    return _leading(mask != 0)


def from_attention(mask: Tensor, batch: int) -> Tensor | None:
    """Padded positions per row, int64 [B], of the mask of an attention call; None if there are none.

    Padding is what no query of any head sees, from position 0 on. Under torch.compile, where values cannot be
    looked at, the result is never None.
    """
    seen = visible(four_dims(mask))
    if not torch.compiler.is_compiling():
        # The last query of a causal mask sees all but padding; only what it misses needs a closer look.
        longest = int(_leading(seen[:, :, -1].any(dim=1)).max())
        if longest == 0:
            return None
        seen = seen[..., :longest]
    pads = _leading(seen.any(dim=2).any(dim=1)).expand(batch)
    if not torch.compiler.is_compiling() and not bool(pads.any()):
        return None
    return pads


def take(tokens: Tensor, index: Tensor) -> Tensor:
    """Rows of tokens [B, H, L, d] in the order of index int64 [B, n]: [B, H, n, d]."""
    heads, dim = tokens.shape[1], tokens.shape[3]
    return tokens.gather(2, index[:, None, :, None].expand(-1, heads, -1, dim))


def take_real(tokens: Tensor, positions: Tensor, pads: Tensor) -> Tensor:
    """Tokens [B, H, L, d] at the positions int64 [B, n], padded ones as zeros: [B, H, n, d]."""
    return zero_padded(take(tokens, positions), positions, pads)


def stream_positions(rows: Tensor | None, sinks: int, first: int, count: int, device: torch.device) -> Tensor:
    """Positions of `count` stream tokens from index `first` on: int64 [B or 1, count]."""
    index = torch.arange(first, first + count, device=device)[None]
    if rows is None:
        return index + sinks
    return torch.where(index < rows[:, 1:], index, index + sinks)


def sink_positions(rows: Tensor | None, sinks: int, device: torch.device) -> Tensor:
    """Positions of the sinks: int64 [B or 1, sinks]."""
    index = torch.arange(sinks, device=device)[None]
    return index if rows is None else rows[:, 1:].to(torch.int64) + index


def zero_padded(tokens: Tensor, positions: Tensor, pads: Tensor) -> Tensor:
    """tokens [B, H, n, d] at positions [B, n], with zeros where a position lies in the row's padding."""
    padded = positions < pads[:, None]
    return tokens.masked_fill(padded[:, None, :, None], 0)


def in_order(sinks: Tensor, stream: Tensor, rows: Tensor | None) -> Tensor:
    """Sinks [B, H, S, d] and stream [B, H, n, d] in the order of positions: [B, H, S + n, d]."""
    both = torch.cat((sinks, stream), dim=2)
    if rows is None:
        return both
    count = sinks.shape[2]
    position = torch.arange(both.shape[2], device=both.device)[None]
    start = rows[:, 1:].to(torch.int64)
    index = torch.where(
        position < start,
        position + count,
        torch.where(position < start + count, position - start, position),
    )
    return take(both, index)
