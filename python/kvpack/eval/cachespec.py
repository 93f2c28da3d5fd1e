"""What is measured: a `CacheSpec` names the codecs and the window, and builds the real cache from it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any


@dataclass(frozen=True)
class CacheSpec:
    """Codecs, window and sinks of a `kvpack.Cache`; `value` None means the key's codec.

    `factory`, if given, builds the cache that `stepwise` and `chunked` run; codecs, window and sinks are then
    only what it is reported under, and what `fake` and `emulated` emulate.
    """

    key: str = "tq4"
    value: str | None = None
    window: int = 128
    sinks: int = 4
    fused: bool = True
    precision: str = "default"
    factory: Callable[[Any], Any] | None = None

    def __post_init__(self) -> None:
        from kvpack import spec

        for codec in (self.key, self.value_codec):
            spec.parse(codec)
        for name in ("window", "sinks"):
            number = getattr(self, name)
            if isinstance(number, bool) or not isinstance(number, int) or number < 0:
                raise ValueError(f"{name}={number!r} is not allowed: a whole number of tokens, 0 or more")

    @property
    def value_codec(self) -> str:
        return self.key if self.value is None else self.value

    @property
    def label(self) -> str:
        """Codec, or key/value codecs where they differ: "tq4", "tq4/tq3"."""
        return self.key if self.value_codec == self.key else f"{self.key}/{self.value_codec}"

    @classmethod
    def parse(cls, text: str, **options: Any) -> CacheSpec:
        """From "codec" or "key codec/value codec"; `options` are further fields."""
        key, slash, value = text.strip().partition("/")
        if not key or (slash and not value):
            raise ValueError(f"codecs {text!r} are not allowed: CODEC or KEYCODEC/VALUECODEC, like tq4/tq3")
        return cls(key=key, value=value or None, **options)

    @classmethod
    def of(cls, cache: Any) -> CacheSpec:
        """From anything that `kvpack.eval` accepts as `cache=`.

        A function is called with a model's config for every document. It may carry the attributes key, value,
        window and sinks for the report (functools.partial objects of kvpack.Cache do).
        """
        if isinstance(cache, CacheSpec):
            return cache
        if isinstance(cache, str):
            return cls.parse(cache)
        known = {field.name for field in fields(cls)} - {"factory"}
        if isinstance(cache, Mapping):
            unknown = sorted(set(cache) - known)
            if unknown:
                raise ValueError(f"cache option {unknown[0]!r} is not one of {', '.join(sorted(known))}")
            return cls(**{str(name): value for name, value in cache.items()})
        if callable(cache):
            named = {**getattr(cache, "keywords", {}), **getattr(cache, "__dict__", {})}
            missing = {"key", "value", "window"} - set(named)
            if missing:
                raise ValueError(
                    f"a cache factory must say what it builds: give it the attributes key, value and window "
                    f"({', '.join(sorted(missing))} missing), or pass a dict or a CacheSpec"
                )
            return cls(factory=cache, **{name: named[name] for name in known if name in named})
        raise ValueError(f"cache={cache!r} is not a dict of Cache options, a CacheSpec, a codec name or a function")

    def build(self, config: Any) -> Any:
        """A fresh `kvpack.Cache` (or what the factory makes) for a model with this config."""
        if self.factory is not None:
            return self.factory(config)
        import kvpack

        return kvpack.Cache(config, **self.options())

    def options(self) -> dict[str, Any]:
        """The keyword arguments of `kvpack.Cache`."""
        return {
            "key": self.key,
            "value": self.value_codec,
            "window": self.window,
            "sinks": self.sinks,
            "fused": self.fused,
            "precision": self.precision,
        }

    def to_json(self) -> dict[str, Any]:
        out = asdict(replace(self, factory=None))
        del out["factory"]
        return {**out, "value": self.value_codec}

    def bits(self, head_dim: int, value_dim: int | None = None) -> float:
        """Honest bits per value of full tiles, the mean of both sides (codes, scales, all metadata)."""
        import kvpack

        value_dim = head_dim if value_dim is None else value_dim
        key = kvpack.codec(self.key, head_dim=head_dim, side="key").bits * head_dim
        value = kvpack.codec(self.value_codec, head_dim=value_dim, side="value").bits * value_dim
        return float(key + value) / (head_dim + value_dim)


def dense_cache(config: Any) -> Any:
    """The stock cache that everything is compared with."""
    from transformers import DynamicCache

    return DynamicCache(config=config)


def dense_bytes(cache: Any) -> int:
    """Bytes of all keys and values of a stock cache."""
    total = 0
    for layer in cache.layers:
        for name in ("keys", "values"):
            tensor = getattr(layer, name, None)
            if tensor is not None:
                total += tensor.numel() * tensor.element_size()
    return total


def full_layers(config: Any) -> tuple[int, ...]:
    """The layers whose keys and values a codec sees: full attention, and no MLA latents.

    Reads the config only; written apart from `kvpack.hf` on purpose, so that the two can disagree in a test.
    """
    from transformers.cache_utils import get_layer_types_and_kwargs

    text = config.get_text_config(decoder=True)
    if getattr(text, "kv_lora_rank", None) is not None:
        return ()
    types, _ = get_layer_types_and_kwargs(text)
    return tuple(i for i, kind in enumerate(types) if kind == "full_attention")


def fill(spec: CacheSpec, dense: Any, config: Any) -> Any:
    """A real cache holding the tokens of a stock one, as one prefill call would have left it.

    The dense keys and values go through `update`, which is what a model would do; other layers are copied.
    """
    cache = spec.build(config)
    packed = set(full_layers(config))
    for index, layer in enumerate(dense.layers):
        if not getattr(layer, "is_initialized", True) or getattr(layer, "keys", None) is None:
            continue
        if index in packed:
            cache.update(layer.keys, layer.values, index)
        else:
            cache.layers[index] = copy.deepcopy(layer)
    return cache


def tokens_read(cache: Any) -> int:
    """Packed tokens that attention has read, summed over calls, in the layer that read most
    (`cache.stats()`).
    """
    return max((int(layer.packed_tokens_read) for layer in cache.stats()), default=0)
