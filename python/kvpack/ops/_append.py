"""Operator ``kvpack::append``: tokens into the buffers of a window."""

from __future__ import annotations

from torch import Tensor

from . import _library

SCHEMA = "append(Tensor(a!) key_buffer, Tensor(b!) value_buffer, Tensor keys, Tensor values, int begin) -> ()"


def _check(key_buffer: Tensor, value_buffer: Tensor, keys: Tensor, values: Tensor, begin: int) -> None:
    for name, buffer, tokens in (("keys", key_buffer, keys), ("values", value_buffer, values)):
        if buffer.dim() != 4 or tokens.dim() != 4:
            raise ValueError(f"{name} have {tokens.dim()} dims, their buffer {buffer.dim()}; both need 4: [B, H, n, d]")
        fits = [tokens.shape[0], tokens.shape[1], tokens.shape[3]] == [
            buffer.shape[0],
            buffer.shape[1],
            buffer.shape[3],
        ]
        if not fits or tokens.dtype != buffer.dtype:
            raise ValueError(
                f"{name} are {tokens.dtype} {list(tokens.shape)}; their buffer is {buffer.dtype} {list(buffer.shape)}"
            )
        if begin < 0 or begin + tokens.shape[2] > buffer.shape[2]:
            raise ValueError(
                f"tokens {begin}..{begin + tokens.shape[2] - 1} of {name} do not lie in the buffer; allowed: "
                f"0..{buffer.shape[2] - 1}"
            )
    if keys.shape[2] != values.shape[2]:
        raise ValueError(f"keys and values differ: {keys.shape[2]} and {values.shape[2]} tokens")


def fake(key_buffer: Tensor, value_buffer: Tensor, keys: Tensor, values: Tensor, begin: int) -> None:
    _check(key_buffer, value_buffer, keys, values, begin)


def default(key_buffer: Tensor, value_buffer: Tensor, keys: Tensor, values: Tensor, begin: int) -> None:
    _check(key_buffer, value_buffer, keys, values, begin)
    key_buffer.narrow(2, begin, keys.shape[2]).copy_(keys)
    value_buffer.narrow(2, begin, values.shape[2]).copy_(values)


OP = _library.register(SCHEMA, fake, default)
