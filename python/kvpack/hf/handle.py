"""Handles: what `update` returns in place of the keys and values of a packed layer.

A handle is a plain Python object, not a tensor: C++ code that is given one fails loudly, and torch.compile
traces through it. It behaves as the dense tensor [B, Hkv, S, d] would:

* `scaled_dot_product_attention` with both handles of one `update` becomes the fused `attend`;
* the repeat_kv chain of transformers (insert a dim, expand, reshape) stays lazy;
* any other operation decodes once and goes on with the dense tensor, so eager or flex attention stay right;
* writing to it, or using it after the cache changed, is an error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_map_only

from .call import KEY, VALUE, Call

_SDPA = F.scaled_dot_product_attention
_ALL = slice(None)

# Where a handle stands in repeat_kv: [B, Hkv, S, d] -> [B, Hkv, 1, S, d] -> expand -> [B, Hkv * n_rep, S, d].
_PLAIN, _EXPANDED, _REPEATED = "plain", "expanded", "repeated"


class Handle:
    """One side (0 keys, 1 values) of a packed layer, seen as a tensor; valid in one epoch of the layer."""

    __slots__ = ("_dense", "call", "n_rep", "shape", "side", "stage")

    requires_grad = False
    is_nested = False
    is_sparse = False
    is_leaf = True
    is_quantized = False
    is_meta = False
    grad_fn = None
    layout = torch.strided

    def __init__(self, call: Call, side: int, shape: torch.Size, stage: str = _PLAIN, n_rep: int = 1) -> None:
        self.call = call
        self.side = side
        self.shape = shape
        self.stage = stage
        self.n_rep = n_rep
        self._dense: Tensor | None = None

    # Metadata, without decoding.

    @property
    def dtype(self) -> torch.dtype:
        return self.call.buffers[self.side].dtype

    @property
    def device(self) -> torch.device:
        return self.call.buffers[self.side].device

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def is_cuda(self) -> bool:
        return self.device.type == "cuda"

    def dim(self) -> int:
        return len(self.shape)

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    def numel(self) -> int:
        return self.shape.numel()

    def __len__(self) -> int:
        return self.shape[0]

    def is_contiguous(self, **options: Any) -> bool:
        return True

    def is_floating_point(self) -> bool:
        return True

    def contiguous(self, **options: Any) -> Handle:
        return self

    def detach(self) -> Handle:
        return self

    def __repr__(self) -> str:
        side = "values" if self.side else "keys"
        return f"Handle({side} of layer {self.call.layer.index}, {tuple(self.shape)}, {self.dtype})"

    # The repeat_kv chain, kept lazy.

    def _as(self, shape: Iterable[int], stage: str, n_rep: int) -> Handle:
        return Handle(self.call, self.side, torch.Size(shape), stage, n_rep)

    def __getitem__(self, index: Any) -> Any:
        inserts = type(index) is tuple and len(index) == 5 and index[2] is None
        if self.stage == _PLAIN and inserts and index[0] == index[1] == index[3] == index[4] == _ALL:
            b, h, s, d = self.shape
            return self._as((b, h, 1, s, d), _EXPANDED, 1)
        return self.dense("indexing")[index]

    def expand(self, *sizes: Any) -> Any:
        wanted = _sizes(sizes)
        if self.stage == _EXPANDED and len(wanted) == 5:
            b, h, _, s, d = self.shape
            if wanted == (b, h, wanted[2], s, d):
                return self._as(wanted, _EXPANDED, wanted[2])
        return self.dense("expand").expand(*sizes)

    def reshape(self, *sizes: Any) -> Any:
        if self.stage == _EXPANDED:
            b, h, r, s, d = self.shape
            if _sizes(sizes) == (b, h * r, s, d):
                return self._as((b, h * r, s, d), _REPEATED, r)
        return self.dense("reshape").reshape(*sizes)

    def to(self, *args: Any, **options: Any) -> Any:
        if options.get("copy") or not all(self._is_already(x) for x in (*args, *options.values())):
            return self.dense("to").to(*args, **options)
        return self

    def _is_already(self, target: Any) -> bool:
        if isinstance(target, torch.dtype):
            return target == self.dtype
        if isinstance(target, (torch.device, str)):
            return torch.device(target) == self.device
        if isinstance(target, (Tensor, Handle)):
            return target.dtype == self.dtype and target.device == self.device
        return target is None or isinstance(target, (bool, torch.memory_format))

    # The way out.

    def dense(self, reason: str = "dense") -> Tensor:
        """The decoded tensor of this handle's shape, memoized on the handle.

        reason: the operation that needs it, for `Cache.stats()`.
        """
        out = self._decoded(reason)
        self.call.layer.nothing_to_learn()
        return out

    def _decoded(self, reason: str) -> Tensor:
        self.call.check()
        if self._dense is None:
            tokens = self.call.dense(self.side, reason)
            if self.stage != _PLAIN:
                b, h, s, d = tokens.shape
                tokens = tokens[:, :, None].expand(b, h, self.n_rep, s, d)
                if self.stage == _REPEATED:
                    tokens = tokens.reshape(b, h * self.n_rep, s, d)
            self._dense = tokens
        return self._dense

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return self.dense("deepcopy").clone()

    def __reduce__(self) -> Any:
        return self.dense("pickle").__reduce_ex__(2)  # type: ignore[no-untyped-call]

    def __array__(self, dtype: Any = None, copy: Any = None) -> Any:
        return self.dense("numpy").numpy().__array__(dtype)

    def __bool__(self) -> bool:
        return bool(self.dense("bool"))

    def __iter__(self) -> Any:
        return iter(self.dense("iteration"))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if name.endswith("_"):
            raise RuntimeError(f"{name} would write to packed keys or values; they are read-only")
        return getattr(self.dense(name), name)

    def __setitem__(self, index: Any, value: Any) -> None:
        raise RuntimeError("assignment would write to packed keys or values; they are read-only")

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is _SDPA:
            return _attention(*args, **kwargs)
        name = getattr(func, "__name__", str(func))
        if (args and type(args[0]) is cls and name in _IN_PLACE) or type(kwargs.get("out")) is cls:
            raise RuntimeError(f"{name} would write to packed keys or values; they are read-only")
        args, kwargs = tree_map_only(cls, lambda handle: handle.dense(name), (args, kwargs))
        return func(*args, **kwargs)


def _sizes(sizes: tuple[Any, ...]) -> tuple[int, ...]:
    return tuple(sizes[0]) if len(sizes) == 1 and not isinstance(sizes[0], int) else tuple(sizes)


_IN_PLACE = frozenset(
    {name for name in dir(Tensor) if name.endswith("_") and not name.endswith("__")}
    | {"__setitem__", "__iadd__", "__isub__", "__imul__", "__itruediv__"}
)


def _operator(name: str) -> Callable[..., Any]:
    def method(self: Handle, *args: Any) -> Any:
        others = [x.dense(name) if isinstance(x, Handle) else x for x in args]
        return getattr(Tensor, name)(self.dense(name), *others)

    return method


_OPERATORS = "add radd sub rsub mul rmul truediv rtruediv matmul rmatmul neg abs pow gt ge lt le eq ne"
for _name in _OPERATORS.split():
    setattr(Handle, f"__{_name}__", _operator(f"__{_name}__"))
Handle.__hash__ = object.__hash__  # type: ignore[method-assign]


def _attention(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """`scaled_dot_product_attention` with at least one handle among its arguments."""
    reason = "other keys or values"
    call = None if type(query) is Handle or type(attn_mask) is Handle else pair(key, value)
    if call is not None:
        layer = call.layer
        count = query.shape[-2]
        call.check(is_causal, count)
        if call.whole:  # nothing is packed yet: what the stock cache does, and the mask tells the padding
            dense = key._decoded("no history"), value._decoded("no history")
            out = _SDPA(query, *dense, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
            layer.saw_mask(attn_mask)
            return out
        layer.check_mask(attn_mask)
        obstacle = call.obstacle(query, attn_mask, dropout_p, is_causal)
        heads, kv_heads = query.shape[1], layer.layout[4]
        broadcasts = enable_gqa or kv_heads == 1  # torch repeats a single head for all queries
        groups = heads // kv_heads if broadcasts else key.n_rep
        if obstacle is None and heads == kv_heads * groups:
            return call.attend(query, attn_mask, scale)
        reason = obstacle or "query heads"
        if attn_mask is None:
            attn_mask = call.padding_mask()
    query, key, value, attn_mask = (x.dense(reason) if type(x) is Handle else x for x in (query, key, value, attn_mask))
    return _SDPA(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)


def pair(key: Any, value: Any) -> Call | None:
    """The call that keys and values come from, if they are the two handles of one, seen as attention sees them."""
    if type(key) is not Handle or type(value) is not Handle:
        return None
    same = key.call is value.call and key.side == KEY and value.side == VALUE and key.stage == value.stage
    return key.call if same and key.stage != _EXPANDED else None
