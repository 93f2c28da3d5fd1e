"""Layers that are not packed, in a snapshot: whatever the stock class keeps in its attributes, if it is data.

Each attribute becomes JSON, in which tensors are named: {"tensor": "layers.3.keys"}. A class that keeps something else
is refused by name, never pickled.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .container import DTYPES, PAGES, Content


def of(layer: Any, name: str, tensors: dict[str, Content]) -> dict[str, Any]:
    """State of a stock layer; its tensors are put in `tensors`, under names that begin with `name`.

    Raises:
        ValueError: the layer keeps something that is not data, named.
    """
    attributes = {
        attribute: _encode(x, f"{name}.{attribute}", tensors, type(layer).__name__)
        for attribute, x in vars(layer).items()
    }
    return {"packed": False, "class": type(layer).__name__, "attributes": attributes}


def restore(layer: Any, state: Mapping[str, Any], name: str, tensors: Mapping[str, Any]) -> None:
    """Give a new stock layer the attributes of a state. ValueError if it is of another class."""
    if state["class"] != type(layer).__name__:
        raise ValueError(f"it is a {state['class']} there, a {type(layer).__name__} in this version of transformers")
    for attribute, x in state["attributes"].items():
        vars(layer)[attribute] = _decode(x, tensors)


def _encode(x: Any, name: str, tensors: dict[str, Content], owner: str) -> Any:
    if x is None or isinstance(x, (bool, int, float, str)):
        return x
    if isinstance(x, Tensor) and x.dtype in DTYPES and x.layout == torch.strided and not name.endswith(PAGES):
        tensors[name] = x
        return {"tensor": name}
    if isinstance(x, torch.dtype):
        return {"dtype": str(x).removeprefix("torch.")}
    if isinstance(x, torch.device):
        return {"device": None}  # what is loaded lies on the CPU
    if isinstance(x, (list, tuple)):
        kind = "list" if isinstance(x, list) else "tuple"
        return {kind: [_encode(item, f"{name}.{i}", tensors, owner) for i, item in enumerate(x)]}
    if isinstance(x, dict) and all(isinstance(key, (int, str)) for key in x):
        return {"dict": [[key, _encode(item, f"{name}.{key}", tensors, owner)] for key, item in x.items()]}
    what = f"{type(x).__name__} of {x.dtype}" if isinstance(x, Tensor) else type(x).__name__
    raise ValueError(
        f"{name}: a {owner} keeps a {what} there, which a snapshot cannot hold; allowed are tensors, numbers, strings, "
        "lists and dicts of them"
    )


def _decode(x: Any, tensors: Mapping[str, Any]) -> Any:
    if not isinstance(x, dict):
        return x
    ((kind, content),) = x.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "dtype":
        return getattr(torch, content)
    if kind == "device":
        return torch.device("cpu")
    if kind in ("list", "tuple"):
        items = [_decode(item, tensors) for item in content]
        return items if kind == "list" else tuple(items)
    if kind == "dict":
        return {key: _decode(item, tensors) for key, item in content}
    raise ValueError(f"a stock layer holds a {kind!r}")
