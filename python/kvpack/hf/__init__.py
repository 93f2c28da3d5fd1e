"""HuggingFace transformers: a cache whose full-attention layers are packed and read in packed form.

* cache.py: Cache, which layers are packed; nbytes, memory, stats
* layer.py: PackedLayer, the stock interface of one layer, and what it learns of padding
* store.py: Store, where its tokens lie: sinks, tiles, window
* call.py: Call, what one update attends to
* attention.py: enable and disable, the attention implementation "kvpack"
* handle.py: Handle, stands for that in place of a tensor, and turns attention into the fused one
* padding.py: left padding, and the order of tokens it leads to
* pages.py: Page and PageTable, packed storage, shared copy-on-write
* page_ops.py: packing as one step of a compiled graph
* memory.py: what caches weigh
* offload.py: pages that wait in host memory, and other devices
* snapshot.py: a cache in a file, and back
* container.py: the bytes of that file
* stock_state.py: what it holds of layers that are not packed
* fingerprint.py: what tells one model from another
* support.py: what a config tells: packed layers, fused attention
* compat.py: what differs between versions of transformers
"""

from kvpack._extras import needed

with needed("kvpack.hf (kvpack.Cache, kvpack.enable, ...)", "hf"):
    from . import compat as compat
    from .attention import disable, enable
    from .cache import Cache
    from .handle import Handle
    from .layer import PackedLayer
    from .memory import nbytes
    from .snapshot import SnapshotError, SnapshotInfo
    from .stats import LayerStats

__all__ = [
    "Cache",
    "Handle",
    "LayerStats",
    "PackedLayer",
    "SnapshotError",
    "SnapshotInfo",
    "disable",
    "enable",
    "nbytes",
]
