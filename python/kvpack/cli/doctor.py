"""`kvpack doctor`: what is installed, what runs natively, and what a model's cache would look like."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvpack._extras import too_old

from .common import DebugOption, JsonOption, output, print_json

if TYPE_CHECKING:
    from kvpack.eval.cachespec import CacheSpec

PACKAGES = (
    "numpy",
    "torch",
    "transformers",
    "safetensors",
    "accelerate",
    "gguf",
    "typer",
    "rich",
    "matplotlib",
    "ray",
)


def own_version() -> str:
    import kvpack

    return str(kvpack.__version__)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def findings() -> dict[str, Any]:
    """Versions, the compiled core, the operators, caches and texts; no model is loaded and nothing is
    fetched.
    """
    import kvpack
    from kvpack.eval.default_model import default_model_path, default_model_ready
    from kvpack.eval.texts import data_dir

    found: dict[str, Any] = {
        "kvpack": own_version(),
        "python": platform.python_version(),
        "machine": f"{platform.machine()} {platform.system()}, {os.cpu_count()} CPUs",
        "packages": {name: _version(name) for name in PACKAGES},
        "build": kvpack.build_info(),
        "isa_available": kvpack.isa.available(),
        "isa_active": kvpack.isa.active(),
        "isa_pinned": os.environ.get("KVPACK_ISA"),
        "codecs": kvpack.codecs(),
        "default_model": {"path": str(default_model_path()), "ready": default_model_ready()},
        "text": importlib.util.find_spec("pydoc_data.topics") is not None,
        "data": str(data_dir() or ""),
    }
    version = found["packages"]["transformers"]
    found["transformers_error"] = None if version is None else too_old(version)
    try:
        import torch

        from kvpack import ops
    except ImportError as error:
        absent = isinstance(error, ModuleNotFoundError) and error.name == "torch"
        found["native_operators"], found["torch_error"] = None, None if absent else str(error)
    else:
        found["native_operators"], found["torch_error"] = bool(ops.native), None
        found["threads"] = torch.get_num_threads()
    return found


def layers_of(config: Any, spec: CacheSpec) -> list[dict[str, Any]]:
    """Per layer: its type, its head sizes (of keys and values) where the config tells them, whether it is packed and
    with which codecs, whether attention reads it packed, and why not.
    """
    from kvpack.hf import support
    from kvpack.policy import pair_label

    attention = support.attention(config)
    out = []
    for index, layer in enumerate(support.layers(config)):
        own, sizes = layer.config, support.head_sizes(layer.config)
        trouble = None if layer.why or sizes is None else _head_size_trouble(sizes, spec.codecs(index))
        packed = layer.why is None and trouble is None
        why = attention.why if packed else trouble or f"{layer.why}: only full attention over keys and values is packed"
        out.append(
            {
                "layer": index,
                "type": layer.type,
                "head_dims": sizes,
                "kv_heads": getattr(own, "num_key_value_heads", None) or getattr(own, "num_attention_heads", None),
                "packed": packed,
                "codecs": pair_label(*spec.codecs(index)) if packed else "",
                "fused": packed and attention.fused,
                "why": why,
            }
        )
    return out


def _head_size_trouble(head_dims: tuple[int, int], codecs: tuple[str, str]) -> str | None:
    import kvpack

    try:
        for size, codec, side in zip(head_dims, codecs, kvpack.spec.SIDES, strict=True):
            kvpack.codec(codec, head_dim=size, side=side)
    except ValueError as error:
        return str(error)
    return None


def model_findings(name: str, codec: str = "tq4") -> dict[str, Any]:
    """What a model's cache would be made of with these codecs or this policy; reads its config only (hub ids: the
    local cache, then the hub).
    """
    from transformers import AutoConfig

    from kvpack.eval import CacheSpec, ModelUnavailableError
    from kvpack.eval.default_model import default_model_path, default_model_ready

    source = name
    if name == "default":
        if not default_model_ready():
            raise ModelUnavailableError("the default model is not in the cache yet: kvpack demo fetches it")
        source = str(default_model_path())
    try:
        config = AutoConfig.from_pretrained(source, local_files_only=Path(source).exists())
    except (OSError, ValueError) as error:
        first = str(error).strip().splitlines()[0]
        raise ModelUnavailableError(f"the config of {name!r} cannot be read: {first}") from error
    spec = CacheSpec.parse(codec)
    found: dict[str, Any] = {"name": name, "type": config.model_type, "layers": layers_of(config, spec)}
    found["encoder_decoder"] = bool(getattr(config, "is_encoder_decoder", False))
    found["verdict"] = _verdict(config, spec)
    return found


def _verdict(config: Any, spec: CacheSpec) -> str:
    """What kvpack.Cache itself says to this config."""
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return repr(spec.build(config))
        except ValueError as error:
            return f"refused: {error}"


def doctor(
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Also say which layers of this model are packed, and fused.")
    ] = None,
    codec: Annotated[
        str, typer.Option("--codec", "-c", help="With --model: codec, KEY/VALUE codecs, a preset or a policy.json.")
    ] = "tq4",
    json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Check the installation, and what a model's cache would look like."""
    found = findings()
    if model is not None:
        found["model"] = model_findings(model, codec)
    healthy = found["native_operators"] is not False and not found["torch_error"] and not found["transformers_error"]
    if json:
        print_json({**found, "healthy": healthy})
    else:
        _show(found)
    if not healthy:
        raise typer.Exit(1)


def _show(found: dict[str, Any]) -> None:
    from rich.table import Table

    console = output()
    build, native = found["build"], found["native_operators"]
    default = found["default_model"]
    lines = {
        "kvpack": f"{found['kvpack']}, format version {build.get('format_version')}",
        "python": f"{found['python']}, {found['machine']}",
        "packages": ", ".join(f"{name} {version or 'MISSING'}" for name, version in found["packages"].items()),
        "build": ", ".join(f"{name} {value}" for name, value in build.items()),
        "ISA": f"{found['isa_active']} active; available: {', '.join(found['isa_available'])}"
        + (f"; KVPACK_ISA={found['isa_pinned']}" if found["isa_pinned"] else ""),
        "operators": {
            True: "native",
            False: "NATIVE LIBRARY MISSING, the PyTorch defaults run: slow",
            None: "no torch" if found["torch_error"] is None else f"TORCH DOES NOT LOAD: {found['torch_error']}",
        }[native],
        **({"threads": str(found["threads"])} if "threads" in found else {}),
        **({"transformers": f"TOO OLD: {found['transformers_error']}"} if found["transformers_error"] else {}),
        "codecs": ", ".join(found["codecs"]),
        "default model": f"{default['path']} ({'ready' if default['ready'] else 'not yet'})",
        "texts": ("topics" if found["text"] else "pydoc_data MISSING")
        + (f", KVPACK_DATA={found['data']}" if found["data"] else ""),
    }
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in lines.items():
        table.add_row(name, value)
    console.print(table)
    if "model" not in found:
        return
    info = found["model"]
    console.print(f"\n{info['name']} ({info['type']}): {info['verdict']}", markup=False)
    layers = Table()
    for name in ("layers", "type", "KV heads", "head size", "packed", "codecs", "fused", "why"):
        layers.add_column(name)
    for first, last, layer in _runs(info["layers"]):
        span = str(first) if first == last else f"{first}-{last}"
        values = (
            layer["type"],
            layer["kv_heads"],
            "/".join(map(str, dict.fromkeys(layer["head_dims"] or "?"))),
            "yes" if layer["packed"] else "no",
            layer["codecs"],
            "yes" if layer["fused"] else "no",
            layer["why"],
        )
        layers.add_row(span, *(str(value) for value in values))
    console.print(layers)


def _runs(layers: list[dict[str, Any]]) -> list[tuple[int, int, dict[str, Any]]]:
    """Neighbouring layers that differ in their number only, as one."""
    out: list[tuple[int, int, dict[str, Any]]] = []
    for layer in layers:
        same = out and {**out[-1][2], "layer": 0} == {**layer, "layer": 0}
        if same:
            out[-1] = (out[-1][0], layer["layer"], out[-1][2])
        else:
            out.append((layer["layer"], layer["layer"], layer))
    return out
