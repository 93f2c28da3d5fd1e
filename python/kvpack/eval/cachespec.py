"""What is measured: a `CacheSpec` names the codecs (or a policy) and the window, and builds the real cache from it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from kvpack.policy import PRESETS, SINKS, WINDOW, Policy, pair_label

_DECIDED = ("key", "value", "window", "sinks")


@dataclass(frozen=True)
class CacheSpec:
    """Codecs, window and sinks of a `kvpack.Cache`; `value` None means the key's codec.

    `policy`, in place of these four, gives every layer its own codecs (a `kvpack.Policy`, a preset's name, or the
    path of a JSON file); they then are the policy's defaults.

    `factory`, if given, builds the cache that `stepwise` and `chunked` run; codecs, window and sinks are then
    only what it is reported under, and what `fake` and `emulated` emulate.
    """

    key: str = "tq4"
    value: str | None = None
    window: int = WINDOW
    sinks: int = SINKS
    fused: bool = True
    precision: str = "default"
    sparse_values: float = 0.0
    factory: Callable[[Any], Any] | None = None
    policy: Policy | None = None

    def __post_init__(self) -> None:
        from kvpack import spec

        if self.policy is not None:
            self._take(Policy.of(self.policy))
        for codec in (self.key, self.value_codec):
            spec.parse(codec)
        for name in ("window", "sinks"):
            number = getattr(self, name)
            if isinstance(number, bool) or not isinstance(number, int) or number < 0:
                raise ValueError(f"{name}={number!r} is not allowed: a whole number of tokens, 0 or more")

    def _take(self, policy: Policy) -> None:
        """Set what the policy decides; ValueError for a field that was given too, and says something else."""
        defaults = {name: type(self).__dataclass_fields__[name].default for name in _DECIDED}
        for name in _DECIDED:
            given, decided = getattr(self, name), getattr(policy, name)
            if given not in (defaults[name], decided):
                raise ValueError(
                    f"{name}={given!r} and policy {policy.label!r} exclude each other: the policy decides it"
                )
            object.__setattr__(self, name, decided)
        object.__setattr__(self, "policy", policy)

    @property
    def value_codec(self) -> str:
        return self.key if self.value is None else self.value

    def codecs(self, layer: int) -> tuple[str, str]:
        """Key and value codec of a layer."""
        return (self.key, self.value_codec) if self.policy is None else self.policy.codecs(layer)

    @property
    def label(self) -> str:
        """Codec, or key/value codecs where they differ ("tq4", "tq4/tq3"); of a policy, its label."""
        return pair_label(self.key, self.value_codec) if self.policy is None else self.policy.label

    @classmethod
    def parse(cls, text: str, **options: Any) -> CacheSpec:
        """From "codec" or "key codec/value codec", a preset's name, or the path of a policy that ends in .json;
        `options` are further fields. A policy keeps its own window and sinks: others than the defaults are an error.
        """
        if cls.names_policy(text):
            return cls(policy=Policy.of(text.strip()), **options)
        key, slash, value = text.strip().partition("/")
        if not key or (slash and not value):
            raise ValueError(f"codecs {text!r} are not allowed: CODEC or KEYCODEC/VALUECODEC, like tq4/tq3")
        return cls(key=key, value=value or None, **options)

    @staticmethod
    def names_policy(text: str) -> bool:
        """Whether a text means a policy, and no codecs: a preset's name, or a path that ends in .json."""
        return text.strip() in PRESETS or text.strip().endswith(".json")

    @classmethod
    def of(cls, cache: Any) -> CacheSpec:
        """From anything that `kvpack.eval` accepts as `cache=`: codecs as text ("tq4/tq3"), a dict of Cache options,
        a `kvpack.Policy`, a CacheSpec, or a function.

        A function is called with a model's config for every document. It may carry the attributes key, value,
        window and sinks for the report (functools.partial objects of kvpack.Cache do).
        """
        if isinstance(cache, CacheSpec):
            return cache
        if isinstance(cache, Policy):
            return cls(policy=cache)
        if isinstance(cache, str):
            return cls.parse(cache)
        known = {field.name for field in fields(cls)} - {"factory"}
        if isinstance(cache, Mapping):
            unknown = sorted(set(cache) - known)
            if unknown:
                raise ValueError(f"cache option {unknown[0]!r} is not one of {', '.join(sorted(known))}")
            both = [name for name in _DECIDED if name in cache] if cache.get("policy") is not None else []
            if both:
                given = cache[both[0]]
                raise ValueError(f"{both[0]}={given!r} and policy={cache['policy']!r} exclude each other")
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
        raise ValueError(
            f"cache={cache!r} is not a dict of Cache options, a Policy, a CacheSpec, a codec name or a function"
        )

    def build(self, config: Any) -> Any:
        """A fresh `kvpack.Cache` (or what the factory makes) for a model with this config."""
        if self.factory is not None:
            return self.factory(config)
        import kvpack

        return kvpack.Cache(config, **self.options())

    def options(self) -> dict[str, Any]:
        """The keyword arguments of `kvpack.Cache`."""
        how = {"fused": self.fused, "precision": self.precision, "sparse_values": self.sparse_values}
        if self.policy is not None:
            return {"policy": self.policy, **how}
        return {"key": self.key, "value": self.value_codec, "window": self.window, "sinks": self.sinks, **how}

    def to_json(self) -> dict[str, Any]:
        """All that figures depend on; `policy` is there only where one was given."""
        out = asdict(replace(self, factory=None, policy=None))
        del out["factory"], out["policy"]
        out["value"] = self.value_codec
        if not self.sparse_values:
            del out["sparse_values"]  # results from before it existed stay valid
        return out if self.policy is None else {**out, "policy": self.policy.to_json()}

    def bits(self, head_dim: int, value_dim: int | None = None, layers: int | Iterable[int] = 1) -> float:
        """Honest bits per value of full tiles, the mean of both sides (codes, scales, all metadata).

        layers: the packed ones, over which a policy's mean is taken (numbers, or how many); codecs that are the
        same everywhere need none.
        """
        policy = self.policy or Policy(self.key, self.value_codec, sinks=self.sinks)
        if not policy.is_uniform and layers == 1:
            raise ValueError(f"bits of policy {policy.label!r} are a mean over layers: say which, bits(..., layers=)")
        return policy.bits(head_dim, layers, value_dim)


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


def head_size(config: Any) -> int:
    """Head size of a model's keys."""
    text = config.get_text_config(decoder=True)
    return int(getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads)


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
