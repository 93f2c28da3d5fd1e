"""The torch operators of kvpack: thin functions over ``torch.ops.kvpack``.

Every operator has a schema, a fake for ``torch.compile`` and a plain PyTorch default; the compiled library,
where it is there, serves the CPU instead (``kvpack.ops.native`` tells). Bad arguments raise ValueError naming
the value and what is allowed.

*Codec code*: ``id | rule << 8 | dtype << 16`` (``kvpack.spec.parse("tq4").code()``). *Side*: 0 key, 1 value.
*Layout*: ``[key_code, key_dim, value_code, value_dim, kv_heads]``, as ``layout`` builds it.
"""

from __future__ import annotations

from collections.abc import Sequence

from kvpack._extras import needed

with needed("kvpack.ops", "torch"):
    import torch
    from torch import Tensor

from . import _append, _attend, _decode, _decode_pages, _encode, _encode_pages, _library, _rotate, _tables
from ._tables import PAGE_TILES, TILE

__all__ = [
    "PAGE_TILES",
    "TILE",
    "append",
    "attend",
    "decode",
    "decode_pages",
    "encode",
    "encode_pages",
    "head_bytes",
    "layout",
    "native",
    "page_bytes",
    "record_bytes",
    "rotate",
    "side_bytes",
]

native: bool = _library.load_native()
"""Whether the compiled operators serve the CPU."""

# Bound once, because attend and append are called for every layer and token.
_append_op = _append.OP
_attend_op = _attend.OP
_attend_counting_op = _attend.COUNTING_OP
_encode_op = _encode.OP
_decode_op = _decode.OP
_rotate_op = _rotate.OP
_encode_pages_op = _encode_pages.OP
_decode_pages_op = _decode_pages.OP


def layout(key_code: int, key_dim: int, value_code: int, value_dim: int, kv_heads: int) -> list[int]:
    """The checked layout list ``[key_code, key_dim, value_code, value_dim, kv_heads]``.

    Raises ValueError for an unknown codec code, a head size that is not supported, or no KV heads.
    """
    out = [key_code, key_dim, value_code, value_dim, kv_heads]
    _tables.parse_layout(out)
    return out


def side_bytes(codec: int, head_dim: int, side: int) -> int:
    """Bytes of one side of a tile (64 tokens of one KV head): scales and codes."""
    return _tables.sections(codec, head_dim, side).total


def record_bytes(layout: Sequence[int]) -> int:
    """Bytes of a record: both sides of a tile, of one KV head. A multiple of 64."""
    return _tables.parse_layout(layout).record


def page_bytes(layout: Sequence[int]) -> int:
    """Bytes of a page: ``PAGE_TILES`` records and the means of every KV head."""
    return _tables.parse_layout(layout).page


def head_bytes(layout: Sequence[int]) -> int:
    """Bytes of the part of a page that belongs to one KV head: its records, then its means."""
    return _tables.parse_layout(layout).head


def encode(x: Tensor, codec: int, side: int) -> tuple[Tensor, Tensor]:
    """Encode vectors to the canonical bytes of whole tiles.

    Args:
        x: [..., tokens, d], float32, float16 or bfloat16 (for `exact`: the dtype in its code); any strides.
        codec: codec code.
        side: 0 key, 1 value.

    Returns:
        uint8 [..., ceil(tokens / 64), side_bytes], the last tile filled with zero vectors; and the means of a
        centred codec, uint8 [..., n, d + 2], n being 0, the number of tiles, or a quarter of it; a split codec's map
        of channels, d / 8 bytes, follows each (alone and for a quarter of the tiles where it is not centred).

    Raises:
        ValueError: for bad arguments, for values that are not finite (of any codec), and for a scale
            that is not finite in float16; the message names side and token.
    """
    out: tuple[Tensor, Tensor] = _encode_op(x, codec, side)
    return out


def decode(
    packed: Tensor, means: Tensor, codec: int, side: int, tokens: int, head_dim: int, dtype: torch.dtype
) -> Tensor:
    """Decode what ``encode`` made.

    Args:
        packed: uint8 [..., tiles, side_bytes].
        means: uint8 [..., n, d + 2], as ``encode`` gives it.
        codec: codec code.
        side: 0 key, 1 value.
        tokens: tokens to return, with ``ceil(tokens / 64) == tiles``.
        head_dim: d.
        dtype: of the result: torch.float32, float16 or bfloat16.

    Returns:
        [..., tokens, d], contiguous.
    """
    out: Tensor = _decode_op(packed, means, codec, side, tokens, head_dim, dtype)
    return out


def rotate(x: Tensor, inverse: bool = False) -> Tensor:
    """The randomized Hadamard rotation ``R x = FWHT(s * x) / sqrt(d)`` of vectors, or its inverse.

    Args:
        x: [..., d], float32, float16 or bfloat16; computed in float32.
        inverse: apply the transpose of R.

    Returns:
        a contiguous tensor of the same shape and dtype.
    """
    out: Tensor = _rotate_op(x, inverse)
    return out


def append(key_buffer: Tensor, value_buffer: Tensor, keys: Tensor, values: Tensor, begin: int) -> None:
    """Copy tokens into buffers, from token ``begin`` on: what two slices and two copies do, at the price of one call.

    Args:
        key_buffer, value_buffer: [B, kv_heads, room, dk or dv], written to.
        keys, values: [B, kv_heads, tokens, dk or dv], of the same dtype; any strides.
        begin: the first token that is written.

    Raises:
        ValueError: for shapes and dtypes that do not fit, and tokens that do not lie in the buffers.
    """
    _append_op(key_buffer, value_buffer, keys, values, begin)


def encode_pages(table: Tensor, keys: Tensor, values: Tensor, first_tile: int, layout: Sequence[int]) -> None:
    """Encode whole tiles of keys and values into pages, from tile ``first_tile`` on.

    Tile t of row b is slot ``t % 4`` of the page at address ``table[b, t // 4]``. The table is trusted as one
    trusts ``data_ptr``: pages must be alive, 64-byte aligned and ``page_bytes(layout)`` long.

    Args:
        table: int64 [B, P], addresses of pages. Declared as mutated: it stands for the pages.
        keys: [B, kv_heads, 64 * n, key_dim]; any strides, best with a contiguous last dim; padded tokens as
            zeros.
        values: [B, kv_heads, 64 * n, value_dim], as keys.
        first_tile: the first tile to write.
        layout: see ``layout``.

    Raises:
        ValueError: for bad arguments, a null or misaligned address, and as ``encode`` does.
    """
    _encode_pages_op(table, keys, values, first_tile, layout)


def decode_pages(table: Tensor, counts: Tensor, side: int, layout: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Decode one side of all packed tokens of a page table.

    Args:
        table: int64 [B, P], addresses of pages.
        counts: int32 [T], tokens of each tile (1..64), the same for all rows.
        side: 0 key, 1 value.
        layout: see ``layout``.
        dtype: of the result: torch.float32, float16 or bfloat16.

    Returns:
        [B, kv_heads, sum(counts), d], contiguous.
    """
    out: Tensor = _decode_pages_op(table, counts, side, layout, dtype)
    return out


def attend(
    query: Tensor,
    table: Tensor,
    counts: Tensor,
    sink_keys: Tensor | None,
    sink_values: Tensor | None,
    keys: Tensor | None,
    values: Tensor | None,
    rows: Tensor | None,
    mask: Tensor | None,
    sink_logits: Tensor | None,
    layout: Sequence[int],
    scale: float,
    softcap: float = 0.0,
    causal: bool = False,
    precision: int = 0,
    sparse_values: float = 0.0,
    unread: Tensor | None = None,
    exact: int = -1,
) -> Tensor:
    """Attention of queries over packed pages, sinks and exact tokens, in one softmax.

    Query head h reads KV head ``h // (Hq / kv_heads)``. S, E: numbers of sinks and of exact tokens. The
    sequence of row b is its *stream* (packed, then exact tokens) with the sinks put in at ``sink_start``:
    stream index i sits at position i if i < sink_start, else at i + S; sink j at sink_start + j.

    Args:
        query: [B, Hq, q, dk], float32, float16 or bfloat16.
        table: int64 [B, P], addresses of pages; P may be 0.
        counts: int32 [T], tokens of each tile (1..64).
        sink_keys, sink_values: [B, kv_heads, S, dk or dv] or both None, dtype of the query; any
            strides, best with a contiguous last dim.
        keys, values: [B, kv_heads, E, dk or dv], the window and the call's own tokens, as sinks.
        rows: int32 [B, 2] of (pad, sink_start), or None for zeros. Positions below pad are masked.
        mask: None, bool (True: attend) or float (added), [B or 1, Hq or 1, q or 1, S + sum(counts) + E]; its
            columns are positions.
        sink_logits: float32 [Hq], one more logit per head that carries no value, or None.
        layout: see ``layout``.
        scale: multiplies the scores.
        softcap: caps the scaled scores at softcap * tanh(score / softcap), before the mask; 0 is off.
        causal: query i sees the exact tokens below E - q + i + 1, and everything before them.
        precision: 0 default (int8 scores), 1 high. The default implementation is float32 either way.
        sparse_values: share of a query's probability, 0 to below 1, that tiles whose values stay unread may have
            together; every tile gets the same part of it. 0 reads all that is not masked.
        unread: int64 [2] or None; adds up the tiles that groups of at most 4 query rows met, and those among them
            whose values stayed unread. The default implementation leaves it alone.
        exact: E, where keys and values have room for more tokens; -1 is all of them.

    Returns:
        [B, Hq, q, dv], contiguous, dtype of the query. A row with nothing to attend to gives zeros; one with a score
        that is NaN, where no mask hides it, is NaN.
    """
    call = (
        query,
        table,
        counts,
        sink_keys,
        sink_values,
        keys,
        values,
        rows,
        mask,
        sink_logits,
        layout,
        scale,
        softcap,
        causal,
        precision,
        sparse_values,
        exact,
    )
    if unread is None:
        out: Tensor = _attend_op(*call)
    else:
        out = query.new_empty((*query.shape[:3], layout[3]))
        _attend_counting_op(*call, out, unread)
    return out
