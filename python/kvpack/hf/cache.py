"""Cache: a transformers cache whose full-attention layers are packed."""

from __future__ import annotations

import copy
import os
import warnings
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import Cache as StockCache
from transformers import DynamicCache, EncoderDecoderCache

from kvpack import ops, spec
from kvpack.policy import SINKS, WINDOW, Policy
from kvpack.spec import CodecSpec

from . import checks, compat, fingerprint, memory, offload, padding, snapshot, support
from .layer import PackedLayer
from .snapshot import SnapshotInfo
from .stats import LayerStats

_PRECISIONS = ("default", "high")


class Cache(StockCache):  # type: ignore[misc]
    """A KV cache that stays packed and is read packed.

    Pass it as `past_key_values` to a model's `generate` or forward. Layers of full attention are packed;
    others (sliding window, linear, MLA, ...) keep the stock class, and a warning names them.

    Args:
        config: the model's config.
        key, value: codecs, such as "tq4" or "tq4:scale=mse"; `key` None means "tq4", `value` None the same
            as `key`.
        policy: codecs by layer, with window and sinks: a `kvpack.Policy`, a preset's name, or the path of a
            JSON file. Instead of key, value, window and sinks.
        window: newest tokens kept exact, at least; up to 63 more wait for a full tile. None: 128.
        sinks: first real tokens of each row kept exact. None: 4.
        fused: let `scaled_dot_product_attention` read packed bits. False gives attention dense tensors,
            decoded on every call: an oracle, slow.
        attention_mask: tokenizer mask [B, L] of the prompt (0 is padding). Left-padded prompts need it only
            where attention is not `sdpa`, whose masks the cache reads itself.
        precision: of the fused path: "default" (int8 scores) or "high".
        sparse_values: of the fused path: the values of whole tiles stay unread while the probability of all such
            tiles together is below this share of a query's; 0 reads them all. `stats()` counts them, but for those
            of compiled graphs.
        encoder_decoder: this is the self-attention half of an `EncoderDecoderCache`; see
            `for_encoder_decoder`, which makes both halves.
        offloading: packed pages wait in host memory, but for those of the layer at work and the next. Nothing on the
            CPU, where a warning says so.
        offload_only_non_sliding: with offloading, layers with a sliding window, which are not packed, stay.

    Raises:
        ValueError: for an unknown codec or option, negative window or sinks, a head size that the codecs
            cannot pack, a policy together with what it decides or naming a layer that is not packed, a model
            with nothing to pack, and an encoder-decoder without `encoder_decoder=True`.
    """

    def __init__(
        self,
        config: Any,
        key: str | CodecSpec | None = None,
        value: str | CodecSpec | None = None,
        *,
        policy: Policy | str | os.PathLike[str] | None = None,
        window: int | None = None,
        sinks: int | None = None,
        fused: bool = True,
        attention_mask: Tensor | None = None,
        precision: str = "default",
        sparse_values: float = 0.0,
        encoder_decoder: bool = False,
        offloading: bool = False,
        offload_only_non_sliding: bool = True,
    ) -> None:
        if not hasattr(config, "get_text_config"):
            raise TypeError(f"config is a {type(config).__name__}; allowed: a transformers config, as model.config")
        if getattr(config, "is_encoder_decoder", False) and not encoder_decoder:
            raise ValueError(
                f"{_model(config)} is an encoder-decoder: it would store cross-attention in a bare cache, "
                "and be silently wrong. Use kvpack.Cache.for_encoder_decoder(config, ...), an EncoderDecoderCache of "
                "kvpack.Cache(config, ..., encoder_decoder=True) and DynamicCache()"
            )
        policy = _policy(policy, key, value, window, sinks)
        if precision not in _PRECISIONS:
            raise ValueError(f"precision={precision!r} is not allowed: {' or '.join(map(repr, _PRECISIONS))}")
        if isinstance(sparse_values, bool) or not 0.0 <= sparse_values < 1.0:
            raise ValueError(f"sparse_values={sparse_values!r} is not allowed: a share, 0 to below 1")

        known = support.layers(config)
        layers: list[Any] = []
        stock: dict[str, list[int]] = {}
        warned: set[str] = set()
        first = None
        if not policy.sinks and any(spec.parse(c).center not in (None, "none") for c in policy.names()):
            warnings.warn(
                f"kvpack.Cache: {policy.label} is centred, but sinks=0: without exact first tokens centring is worth "
                "nothing, or worse (docs/quality.md)",
                stacklevel=2,
            )
        policy.check(len(known))
        for index, (kind, why, options, own) in enumerate(known):
            if why is not None:
                stock.setdefault(why, []).append(index)
                layers.append(compat.stock_layer(kind, options))
                continue
            first = index if first is None else first
            key, value = policy.codecs(index)
            key_spec = spec.of_cache(key, "key", policy.sinks)
            value_spec = spec.of_cache(value, "value", policy.sinks)
            _check_head_size(index, own, (key_spec, value_spec))
            layers.append(
                PackedLayer(
                    key_spec,
                    value_spec,
                    window=policy.window,
                    sinks=policy.sinks,
                    fused=fused,
                    precision=_PRECISIONS.index(precision),
                    sparse_values=float(sparse_values),
                    index=index,
                    guards_prompt=index == first,
                    warned=warned,
                )
            )
        if first is None:
            raise ValueError(f"nothing to pack in {_model(config)}: {_listing(stock)}")
        policy.check(len(known), {layer.index for layer in layers if isinstance(layer, PackedLayer)})
        if stock:
            warnings.warn(f"kvpack: not packed in {_model(config)}: {_listing(stock)}", stacklevel=2)
        super().__init__(layers=layers)
        # Not given to the stock class, which makes a CUDA stream at once.
        self.offloading, self.only_non_sliding = offloading, offload_only_non_sliding
        self.policy = policy
        self.options = {"fused": fused, "precision": precision, "sparse_values": float(sparse_values)}
        self.model_fields = fingerprint.of_config(config)  # JSON: what snapshots compare
        self._model_name = _model(config)
        self._kinds = [(layer.type, layer.why) for layer in known]
        if attention_mask is not None:
            self.set_padding(attention_mask)

    @classmethod
    def for_encoder_decoder(cls, config: Any, *args: Any, **options: Any) -> EncoderDecoderCache:
        """The cache of an encoder-decoder: packed self-attention, stock cross-attention.

        Arguments as of `Cache`. Unlike transformers' own class, which insists on stock caches for `crop` and the
        `batch_*` methods, it passes them on.
        """
        return _EncoderDecoder(cls(config, *args, encoder_decoder=True, **options), DynamicCache())

    def __repr__(self) -> str:
        packed = self.packed_layers
        return (
            f"kvpack.Cache({self._model_name}, {self._codecs()}, {len(packed)} of {len(self.layers)} layers "
            f"packed, {self.get_seq_length()} tokens, {self.nbytes} bytes)"
        )

    def _codecs(self) -> str:
        """The codecs of the packed layers, the commonest first: "tq4/tq3", or "tq3/tq3 (24 layers), ..."."""
        counts = Counter("/".join(map(str, layer.specs)) for layer in self.packed_layers)
        if len(counts) == 1:
            return next(iter(counts))
        shown = [f"{pair} ({count} layer{'s' if count > 1 else ''})" for pair, count in counts.most_common()]
        return ", ".join(shown[:4]) + (f", {len(shown) - 4} more pairs" if len(shown) > 4 else "")

    @property
    def packed_layers(self) -> list[PackedLayer]:
        """The layers that are packed."""
        return [layer for layer in self.layers if isinstance(layer, PackedLayer)]

    @property
    def nbytes(self) -> int:
        """Bytes of everything the cache keeps, a page that rows share once. See also `kvpack.nbytes`."""
        return memory.nbytes(self)

    def memory(self) -> dict[str, int]:
        """Bytes by kind: codes, scales, means, window, sinks, slack, tables, other, workspace."""
        return memory.memory(self)

    def stats(self) -> list[LayerStats]:
        """Every layer of the model: what happened in it since the cache was made or reset, or why it is not packed."""
        return [
            layer.stats()
            if isinstance(layer, PackedLayer)
            else LayerStats(layer=index, type=kind, packed=False, why=f"{why}: the stock class serves it")
            for index, (layer, (kind, why)) in enumerate(zip(self.layers, self._kinds, strict=True))
        ]

    def set_padding(self, mask: Tensor) -> None:
        """Tell which leading positions of each row are padding, before the prompt is run.

        mask: [B, L], 0 is padding, as tokenizers return it; only leading zeros count. With `sdpa` attention
        the cache reads it from the model's masks; with others it has to be told. `reset()` forgets it.
        """
        if mask.dim() != 2 or mask.shape[0] == 0:
            raise ValueError(f"the padding mask has shape {list(mask.shape)}; allowed: [rows, positions]")
        pads = padding.from_attention_mask(mask)
        for layer in self.packed_layers:
            layer.set_padding(pads)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Any, Any]:
        """Append keys and values [B, Hkv, tokens, d] to a layer, and return what attention is to read."""
        if not self.offloading:
            out: tuple[Any, Any] = self.layers[layer_idx].update(key_states, value_states, *args, **kwargs)
            return out
        offload.before_update(self, layer_idx, key_states.device)
        out = self.layers[layer_idx].update(key_states, value_states, *args, **kwargs)
        offload.after_update(self, layer_idx)
        return out

    def prefetch(self, layer_idx: int, only_non_sliding: bool = True) -> None:
        """Start to bring back the next offloaded layer, from `layer_idx` on, then from the first on."""
        offload.prefetch(self, layer_idx, only_non_sliding)

    def to(self, device: torch.device | str | int) -> Cache:
        """Move everything to a device, in place; returns the cache. Handles made before are no longer valid.

        Attention runs on the CPU in this release: elsewhere a cache can be kept, and come back.
        """
        target = torch.empty(0, device=device).device  # "cuda" becomes "cuda:0"
        if target.type == "meta":
            raise ValueError("to('meta') would lose the tokens; allowed: a device that holds values")
        for layer in self.layers:
            if isinstance(layer, PackedLayer):
                layer.to(target)
            else:
                offload.move_stock(layer, target)
        return self

    def fork(self, count: int) -> list[Cache]:
        """`count` caches that go on from here, each for itself; this one is not changed and may go on, too.

        Packed pages are shared, copy-on-write: a fork holds its own window, sinks and tables, the layers that are not
        packed, and the pages that it writes. `kvpack.nbytes(*forks)` counts what is shared once.
        """
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise ValueError(f"fork({count!r}) is not allowed: a whole number of caches, 1 or more")
        return [copy.deepcopy(self) for _ in range(count)]

    def save(self, path: str | os.PathLike[str], *, token_ids: Tensor | None = None, model: Any = None) -> None:
        """Write the cache to a file, a snapshot, from which `load` makes one that goes on bit-identically.

        The file appears whole or not at all, and is then never written again. docs/snapshot.md says what is in it.

        Args:
            path: of the file; what is there is replaced.
            token_ids: [B, length] of all tokens in the cache, to be kept beside it; `inspect` returns them.
            model: the model; `load` can then refuse other weights. Without it, only the config is compared.

        Raises:
            OSError: the file cannot be written; nothing is left behind.
            ValueError: token ids of another shape, or a layer whose class keeps what a file cannot hold.
        """
        snapshot.save(self, path, token_ids, model)

    @classmethod
    def load(cls, path: str | os.PathLike[str], config: Any, *, model: Any = None, mmap: bool = False) -> Cache:
        """The cache that `save` wrote, on the CPU. Every byte of the file is verified.

        Policy, `fused`, `precision` and `sparse_values` are those of the file; `stats()` begins anew.

        Args:
            path: of the file.
            config: the model's config; that of another model is refused.
            model: the model, to compare its weights as well; the file must have been saved with one.
            mmap: leave packed pages in the file, as views of a private memory map: processes share them, and no copy is
                made. Then nobody may change or truncate the file in place while the cache lives (to save over it, or to
                delete it, is harmless). False reads them into memory, and the file may be anything afterwards.

        Raises:
            OSError: the file cannot be read.
            SnapshotError: (a ValueError) it is no snapshot, of another version or model, truncated, or damaged: the
                message says which.
        """
        return snapshot.load(cls, path, config, model, mmap)

    @staticmethod
    def inspect(path: str | os.PathLike[str]) -> SnapshotInfo:
        """What a snapshot says of itself, with the token ids that were saved beside it; errors as of `load`."""
        return snapshot.inspect(path)

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last `-tokens_to_remove` tokens from every layer; a positive number is an error."""
        if tokens_to_remove > 0:  # before any layer is touched
            raise ValueError(checks.CROP.format(tokens_to_remove))
        super().crop(tokens_to_remove)


class _EncoderDecoder(EncoderDecoderCache):  # type: ignore[misc]
    """An `EncoderDecoderCache` that crops and selects rows, as both of its halves can."""

    def check_dynamic_cache(self, method: str) -> None:
        """The stock check for `DynamicCache`."""


def _model(config: Any) -> str:
    return f"a {getattr(config, 'model_type', '') or type(config).__name__} model"


def _listing(stock: Mapping[str, list[int]]) -> str:
    parts = []
    for why, layers in stock.items():
        shown = ", ".join(map(str, layers[:8])) + (", ..." if len(layers) > 8 else "")
        parts.append(f"{why} (layer{'s' if len(layers) > 1 else ''} {shown})")
    return "; ".join(parts) + "; only full attention over keys and values is packed"


def _policy(
    policy: Policy | str | os.PathLike[str] | None,
    key: str | CodecSpec | None,
    value: str | CodecSpec | None,
    window: int | None,
    sinks: int | None,
) -> Policy:
    """The policy that is given, or the uniform one that the other arguments describe."""
    if policy is None:
        return Policy.uniform(
            "tq4" if key is None else spec.parse(key),
            None if value is None else spec.parse(value),
            window=WINDOW if window is None else window,
            sinks=SINKS if sinks is None else sinks,
        )
    for name, given in (("key", key), ("value", value), ("window", window), ("sinks", sinks)):
        if given is not None:
            raise ValueError(
                f"{name}={given!r} and policy={policy!r} exclude each other: the policy decides codecs, window and "
                "sinks (kvpack.Policy.uniform makes one from them)"
            )
    return Policy.of(policy)


def _check_head_size(layer: int, config: Any, specs: tuple[CodecSpec, CodecSpec]) -> None:
    """ValueError early, where the config already tells that a layer's head size cannot be packed."""
    sizes = support.head_sizes(config)
    if sizes is None:
        return
    for side, codec in enumerate(specs):
        try:
            ops.side_bytes(codec.code(), sizes[side], side)
        except ValueError as error:
            name = "key" if side == 0 else "value"
            raise ValueError(f"layer {layer} cannot be packed with {name} codec {codec}: {error}") from error
