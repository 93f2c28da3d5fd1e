"""Canonical bytes of one side of a tile, in PyTorch: packing and unpacking.

One side of a tile is ``[scales][mean][codes]``. Scales are float16, scale block major. Codes run over *lanes*
and *depth*: a key's lanes are tokens and its depth dims, a value's lanes are dims and its depth tokens.

    superblock (64 lanes) > unit (4 * UV depths) > block (16 lanes) > plane > line of 64 bytes
    line byte = (lane % 16) * 4 + depth % 4; j = (depth / 4) % UV places the code inside the byte

Where the depth ends in the middle of a unit of 8 dwords, each pair of blocks shares one more unit, after all others of
its superblock: the dwords of the first block, then those of the second.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import _quantize
from ._tables import KEY, TILE, Codec, Sections

_VALUES_PER_BYTE_COLUMN = {8: 1, 4: 2, 3: 8, 2: 4}  # UV: depths that share one byte column of a unit


def _merge(fields: Tensor, bits: int) -> Tensor:
    """Codes [..., UV, 16, 4] to bytes [..., planes, 16, 4]."""
    if bits != 3:
        out = fields[..., 0, :, :]
        for j in range(1, fields.shape[-3]):
            out = out | fields[..., j, :, :] << (bits * j)
        return out[..., None, :, :]
    pair = fields[..., 6, :, :] | fields[..., 7, :, :] << 3  # six bits, two for the top of each plane
    planes = []
    for x in range(3):
        low, high = fields[..., 2 * x, :, :], fields[..., 2 * x + 1, :, :]
        planes.append(low | high << 3 | (pair >> (2 * x) & 3) << 6)
    return torch.stack(planes, dim=-3)


def _part(lines: Tensor, bits: int) -> Tensor:
    """The inverse of ``_merge``."""
    if bits != 3:
        uv, mask = _VALUES_PER_BYTE_COLUMN[bits], (1 << bits) - 1
        return torch.stack([lines[..., 0, :, :] >> (bits * j) & mask for j in range(uv)], dim=-3)
    planes = [lines[..., x, :, :] for x in range(3)]
    fields = [planes[j // 2] >> (3 * (j % 2)) & 7 for j in range(6)]
    pair = planes[0] >> 6 | planes[1] >> 6 << 2 | planes[2] >> 6 << 4
    return torch.stack([*fields, pair & 7, pair >> 3], dim=-3)


def _superblocks(lanes: int) -> list[tuple[int, int]]:
    """(first lane, lanes) of the runs of superblocks that have equal width."""
    full = lanes // 64 * 64
    return [run for run in ((0, full), (full, lanes - full)) if run[1]]


def pack_codes(codes: Tensor, bits: int, side: int) -> Tensor:
    """Bytes [..., 64*d*bits/8] of the codes uint8 [..., 64, d] of whole tiles."""
    grid = codes if side == KEY else codes.transpose(-1, -2)  # [..., lane, depth]
    head, (lanes, depth) = grid.shape[:-2], grid.shape[-2:]
    uv = _VALUES_PER_BYTE_COLUMN[bits]
    whole = depth // (4 * uv) * 4 * uv
    out = []
    for first, width in _superblocks(lanes):
        nb = min(width, 64) // 16
        part = grid[..., first : first + width, :].reshape(-1, width // (16 * nb), nb, 16, depth)
        # superblock, block, lane, unit, j, depth % 4  ->  superblock, unit, block, j, lane, depth % 4
        units = part[..., :whole].reshape(*part.shape[:4], whole // (4 * uv), uv, 4)
        lines = [_merge(units.permute(0, 1, 4, 2, 5, 3, 6), bits).flatten(2)]
        if whole < depth:
            # superblock, pair, half, lane, j, depth % 4  ->  superblock, pair, half and j, lane, depth % 4
            rest = part[..., whole:].reshape(-1, part.shape[1], nb // 2, 2, 16, uv // 2, 4)
            shared = rest.permute(0, 1, 2, 3, 5, 4, 6).flatten(3, 4)
            lines.append(_merge(shared, bits).flatten(2))
        out.append(torch.cat(lines, dim=-1).reshape(*head, width * depth * bits // 8))
    return torch.cat(out, dim=-1)


def unpack_codes(data: Tensor, bits: int, side: int, head_dim: int) -> Tensor:
    """Codes uint8 [..., 64, d] of the bytes [..., 64*d*bits/8]."""
    lanes, depth = (TILE, head_dim) if side == KEY else (head_dim, TILE)
    uv = _VALUES_PER_BYTE_COLUMN[bits]
    planes, whole = bits * uv // 8, depth // (4 * uv) * 4 * uv
    out = []
    for first, width in _superblocks(lanes):
        nb = min(width, 64) // 16
        part = data[..., first * depth * bits // 8 : (first + width) * depth * bits // 8]
        part = part.reshape(-1, width // (16 * nb), 2 * nb * depth * bits)
        units = part[..., : 2 * nb * whole * bits].reshape(-1, part.shape[1], whole // (4 * uv), nb, planes, 16, 4)
        fields = [_part(units, bits).permute(0, 1, 3, 5, 2, 4, 6).flatten(4)]
        if whole < depth:
            shared = part[..., 2 * nb * whole * bits :].reshape(-1, part.shape[1], nb // 2, planes, 16, 4)
            halves = _part(shared, bits).reshape(-1, part.shape[1], nb // 2, 2, uv // 2, 16, 4)
            fields.append(halves.permute(0, 1, 2, 3, 5, 4, 6).flatten(2, 3).flatten(4))
        out.append(torch.cat(fields, dim=-1).reshape(*data.shape[:-1], width, depth))
    grid = torch.cat(out, dim=-2)
    return grid if side == KEY else grid.transpose(-1, -2)


def _reinterpret(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The bytes of x as another dtype. The copy gives them the order and alignment that ``view`` needs."""
    return x.clone(memory_format=torch.contiguous_format).view(dtype)


def encode_tiles(x: Tensor, codec: Codec, side: int, sizes: Sections) -> Tensor:
    """Canonical bytes [..., tiles, side_bytes] of x [..., tokens, d]; the last tile is filled with zeros."""
    *head, tokens, d = x.shape
    tiles = -(-tokens // TILE)
    if x.numel() == 0:
        return x.new_empty((*head, tiles, sizes.total), dtype=torch.uint8)
    if tokens % TILE:
        fill = x.new_zeros((*head, tiles * TILE - tokens, d))
        x = torch.cat((x, fill), dim=-2)
    if codec.exact:
        _quantize.check_finite(x, side)
        whole = x.reshape(*head, tiles, TILE, d)
        elements = whole.transpose(-1, -2) if side == KEY else whole
        return _reinterpret(elements, torch.uint8).reshape(*head, tiles, sizes.codes)
    codes, scales = _quantize.quantize(x.to(torch.float32), codec, side)
    codes = pack_codes(codes.reshape(*head, tiles, TILE, d), codec.bits, side)
    scales = scales.reshape(*head, tiles, TILE, codec.scale_blocks(d)).transpose(-1, -2)
    return torch.cat((_reinterpret(scales, torch.uint8).reshape(*head, tiles, sizes.scales), codes), dim=-1)


def decode_tiles(data: Tensor, codec: Codec, side: int, head_dim: int, sizes: Sections) -> Tensor:
    """Vectors [..., tiles, 64, d] of bytes [..., tiles, side_bytes]: float32, for exact its own dtype."""
    head = data.shape[:-1]
    if data.numel() == 0:
        return data.new_empty((*head, TILE, head_dim), dtype=codec.dtype)
    if codec.exact:
        elements = _reinterpret(data, codec.dtype)
        if side == KEY:
            return elements.reshape(*head, head_dim, TILE).transpose(-1, -2)
        return elements.reshape(*head, TILE, head_dim)
    scales = _reinterpret(data[..., : sizes.scales], torch.float16)
    scales = scales.reshape(*head, codec.scale_blocks(head_dim), TILE).transpose(-1, -2)
    codes = unpack_codes(data[..., sizes.scales + sizes.mean :], codec.bits, side, head_dim)
    return _quantize.dequantize(codes, scales, codec)
