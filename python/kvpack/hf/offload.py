"""Offloading: packed pages wait in host memory while other layers are at work.

    layer at work   0: pages 0 and 1 on the device     the interface is that of transformers' caches: `offloading=True`,
                    1: pages 1 and 2                   `offload(layer)`, `prefetch(layer)`
                    2: pages 2 and 0 ...

A handle reads its layer's pages when attention runs, after `update` has returned. So a packed layer is not offloaded at
the end of its own update, as stock layers are, but when the next packed layer is updated. Window, sinks and page tables
stay on the device: they are small, and written by every step.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only
from transformers.cache_utils import CacheLayerMixin

if TYPE_CHECKING:
    from .cache import Cache


class Transfer:
    """Copies between a device and host memory, which is pinned where the device is CUDA.

    `store` is done when it returns. What `load` copies inside of `ahead` may still be under way: on CUDA it has a
    stream of its own there, and `ready` makes the current stream wait for it.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream: Any = None
        if device.type == "cuda":
            self.stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def store(self, x: Tensor) -> Tensor:
        """A copy in host memory."""
        return torch.empty(x.shape, dtype=x.dtype, pin_memory=self.stream is not None).copy_(x)

    def load(self, x: Tensor) -> Tensor:
        """A copy on the device."""
        return x.to(self.device, non_blocking=True)

    @contextmanager
    def ahead(self) -> Iterator[None]:
        """Around loads that may run beside the computation."""
        if self.stream is None:
            yield
            return
        # What was freed on the device may still be read by work under way: until then its memory must not be taken.
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            yield

    def ready(self) -> None:
        """From here on, what was loaded ahead may be used."""
        if self.stream is not None:
            torch.cuda.current_stream(self.device).wait_stream(self.stream)


@lru_cache
def transfer(device: torch.device) -> Transfer | None:
    """What copies for a device, one for all caches; None for the CPU, which works in host memory."""
    return None if device.type == "cpu" else Transfer(device)


def before_update(cache: Cache, index: int, device: torch.device) -> None:
    """Make layer `index` ready to be updated with tensors on the device, start on the next, offload all others."""
    layer, packed = cache.layers[index], cache.packed_layers
    if layer not in packed:
        if _moves(cache, index, cache.only_non_sliding):
            layer.prefetch()
        return
    if transfer(device) is None and "offloading" not in layer.warned:
        layer.warned.add("offloading")
        warnings.warn(f"kvpack: offloading=True does nothing where keys and values are on {device}", stacklevel=3)
    following = packed[(packed.index(layer) + 1) % len(packed)]
    for other in packed:
        if other is not layer and other is not following:
            other.offload()
    layer.prefetch()
    following.prefetch()


def after_update(cache: Cache, index: int) -> None:
    """Offload layer `index` if the stock class serves it: what its update returned are tensors, which stay."""
    if _moves(cache, index, cache.only_non_sliding) and cache.layers[index] not in cache.packed_layers:
        cache.layers[index].offload()


def prefetch(cache: Cache, index: int, only_non_sliding: bool) -> None:
    """Start to bring back the first layer from `index` on, or else from the first on, that may have been offloaded."""
    count = len(cache.layers)
    for i in [*range(index, count), *range(min(index, count))]:
        if _moves(cache, i, only_non_sliding):
            cache.layers[i].prefetch()
            return


def _moves(cache: Cache, index: int, only_non_sliding: bool) -> bool:
    """Whether a layer takes part, as transformers has it: no linear or dummy ones, sliding ones only if asked to."""
    attends = isinstance(cache.layers[index], CacheLayerMixin) and not cache.is_linear[index]
    return attends and not (only_non_sliding and cache.is_sliding[index])


def move_stock(layer: Any, device: torch.device) -> None:
    """Move a layer that is not packed to a device."""
    for name, x in vars(layer).items():
        vars(layer)[name] = tree_map_only(Tensor, lambda tensor: tensor.to(device), x)
    if getattr(layer, "device", None) is not None:
        layer.device = device
