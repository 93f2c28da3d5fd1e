"""The quantized caches that transformers itself ships, driven as they ship, at the bytes that they really hold.

They cannot be emulated in one pass: a flush quantizes again what was quantized before, so what a query sees depends on
how the tokens came. They run `chunked`: a first call of `prompt` tokens (which returns its own keys and values
exact), then calls of `chunk` tokens.

Source: transformers.cache_utils.QuantizedCache; quanto (optimum-quanto) and hqq are packages of their own.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .modes import Feed, forward


@dataclass(frozen=True)
class Peer:
    """A cache of another package. `options`: of QuantizedCache, beside the backend; the rest is its default."""

    name: str
    backend: str
    options: dict[str, int] = field(default_factory=dict)
    package: str = ""
    """Module that has to be installed, and the distribution's name: "module distribution"."""

    @property
    def missing(self) -> str:
        """Why it cannot be run here, or "" if it can."""
        module, _, distribution = self.package.partition(" ")
        try:
            found = not module or importlib.util.find_spec(module) is not None
        except ModuleNotFoundError:  # the parent of a submodule
            found = False
        if not found:
            return f"{self.name}: {distribution} is not installed (pip install 'kvpack[peers]')"
        if self.backend == "fp8":
            from transformers import cache_utils

            if not hasattr(cache_utils, "Fp8QuantizedLayer"):
                return f"{self.name}: this transformers has no fp8 cache"
        return ""

    @property
    def versions(self) -> dict[str, str]:
        """Of the distributions that it is made of."""
        names = ["transformers", *self.package.split()[1:]]
        return {name: importlib.metadata.version(name) for name in names}

    def build(self, config: Any) -> Any:
        """A fresh cache for a model with this config."""
        from transformers import QuantizedCache

        return QuantizedCache(self.backend, config, **self.options)

    def to_json(self) -> dict[str, Any]:
        return {"peer": self.name, "backend": self.backend, "options": json.dumps(self.options, sort_keys=True)}


_QUANTO, _HQQ = "optimum.quanto optimum-quanto", "hqq hqq"
# hqq along the last axis, as its authors and the documentation of transformers advise.
PEERS = (
    Peer("quanto int4", "quanto", {"nbits": 4}, _QUANTO),
    Peer("quanto int2", "quanto", {"nbits": 2}, _QUANTO),
    Peer("hqq int4", "hqq", {"nbits": 4, "axis_key": 1, "axis_value": 1}, _HQQ),
    Peer("hqq int2", "hqq", {"nbits": 2, "axis_key": 1, "axis_value": 1}, _HQQ),
    Peer("transformers fp8", "fp8"),
)


def peer(name: str) -> Peer:
    """The peer called `name`. ValueError names what is allowed."""
    for one in PEERS:
        if one.name == name:
            return one
    raise ValueError(f"peer {name!r} is not one of {', '.join(one.name for one in PEERS)}")


class PeerRun:
    """One document under a peer's cache; iterating yields logits [n, vocabulary] of the scored positions."""

    def __init__(self, model: Any, ids: Tensor, one: Peer, feed: Feed) -> None:
        self.model, self.ids, self.peer, self.feed = model, ids, one, feed

    def __iter__(self) -> Iterator[Tensor]:
        cache = self.peer.build(self.model.config)
        for begin, end in self.feed.calls(len(self.ids) - 1):
            scored = max(0, end - max(begin, self.feed.first))
            logits = forward(self.model, self.ids[begin:end], cache, keep=max(1, scored))
            if scored:
                yield logits[-scored:]


@torch.no_grad()
def fill_peer(one: Peer, dense: Any, config: Any, prompt: int, chunk: int) -> Any:
    """A peer's cache holding the tokens of a stock one, fed in the same calls as a `PeerRun`."""
    cache = one.build(config)
    for begin, end in Feed(prompt, chunk, 0).calls(int(dense.get_seq_length())):
        for index, layer in enumerate(dense.layers):
            cache.update(layer.keys[:, :, begin:end], layer.values[:, :, begin:end], index)
    return cache


def held_bytes(cache: Any) -> int:
    """Bytes of every tensor that can be reached from a cache, storage that several share once.

    Looks into containers, into objects' attributes, and into tensor subclasses that wrap other tensors (quanto's).
    """
    storages: dict[int, int] = {}
    seen: set[int] = set()
    todo: list[Any] = [cache]
    keep = []  # so that no id is used twice
    while todo:
        x = todo.pop()
        if id(x) in seen or isinstance(x, (str, bytes, int, float, bool, type, torch.device, torch.dtype)):
            continue
        seen.add(id(x))
        keep.append(x)
        if isinstance(x, Tensor):
            if type(x) is not Tensor and hasattr(x, "__tensor_flatten__"):
                names, _ = x.__tensor_flatten__()
                todo += [getattr(x, name) for name in names]
            else:
                storage = x.untyped_storage()
                if storage.nbytes():
                    storages[storage.data_ptr()] = storage.nbytes()
        elif isinstance(x, Mapping):
            todo += x.values()
        elif isinstance(x, (list, tuple, set)):
            todo += x
        elif hasattr(x, "__dict__") and not callable(x):
            todo += vars(x).values()
    return sum(storages.values())
