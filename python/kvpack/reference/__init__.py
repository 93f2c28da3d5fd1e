"""The specification of kvpack in NumPy: what every backend is tested against. Depends on numpy only.

    codebooks   levels, units and thresholds of the Lloyd-Max codecs, and where they come from
    hadamard    Hadamard matrices and transforms
    rotation    the randomized Hadamard rotation
    codecs      the table of codecs
    quantize    vectors <-> codes and scales
    packing     codes and scales <-> canonical bytes of one tile
    codec       tokens <-> tiles, records and pages of canonical bytes
    attention   attention over decoded tokens; which stored token sits at which position
    window      how many tokens are packed before a call

Two precisions. *Encoding* is specified in float32, operation by operation: codes, scales and bytes of every
backend equal these exactly. *Decoding and attention* are specified in float64: backends come close to these.
"""

from .attention import attend, positions, sink_start
from .codebooks import CODEBOOKS, Codebook, distortion, lloyd_max
from .codec import (
    LINE,
    MEANS_PER_PAGE,
    PAGE_TILES,
    codec_code,
    decode,
    encode,
    encode_means,
    join_means,
    join_pages,
    join_record,
    map_bytes,
    means_bytes,
    names,
    page_bytes,
    record_bytes,
    sections,
    side_bytes,
    split_pages,
    split_record,
)
from .hadamard import fwht, hadamard_matrix, hadamard_transform, order_of
from .packing import SIDES, TILE
from .quantize import CENTERS, CODECS, HEAD_SIZES, SCALE_RULES, dequantize, maps, means, quantize, unsupported_head_size
from .rotation import rotate, sign_words, signs
from .window import packed_tokens

__all__ = [
    "CENTERS",
    "CODEBOOKS",
    "CODECS",
    "HEAD_SIZES",
    "LINE",
    "MEANS_PER_PAGE",
    "PAGE_TILES",
    "SCALE_RULES",
    "SIDES",
    "TILE",
    "Codebook",
    "attend",
    "codec_code",
    "decode",
    "dequantize",
    "distortion",
    "encode",
    "encode_means",
    "fwht",
    "hadamard_matrix",
    "hadamard_transform",
    "join_means",
    "join_pages",
    "join_record",
    "lloyd_max",
    "map_bytes",
    "maps",
    "means",
    "means_bytes",
    "names",
    "order_of",
    "packed_tokens",
    "page_bytes",
    "positions",
    "quantize",
    "record_bytes",
    "rotate",
    "sections",
    "side_bytes",
    "sign_words",
    "signs",
    "sink_start",
    "split_pages",
    "split_record",
    "unsupported_head_size",
]
