"""`kvpack codecs`: every codec with its honest bits."""

from __future__ import annotations

from typing import Any

from .common import DebugOption, JsonOption, output, print_json

HEAD_SIZES = (64, 128)


def codec_rows() -> list[dict[str, Any]]:
    """name, bits per value of full tiles at each head size (codes, scales, all metadata), rotated, what,
    source.
    """
    import kvpack
    from kvpack import _core

    rows = []
    for entry in _core.registry():
        name = entry["name"]
        bits = {str(d): kvpack.codec(name, head_dim=d, side="key").bits for d in HEAD_SIZES}
        rows.append(
            {
                "name": name,
                "bits": bits,
                "code_bits": entry["bits"],
                "rotated": bool(entry["rotated"]),
                "scale_block": entry["scale_block"],
                "what": entry["what"],
                "source": entry["source"],
            }
        )
    return rows


def codecs(json: JsonOption = False, debug: DebugOption = False) -> None:
    """List the codecs: honest bits per value (codes, scales and all metadata), and where each comes from."""
    rows = codec_rows()
    if json:
        print_json({"codecs": rows})
        return
    from rich.table import Table

    table = Table(title="Codecs: bits per value of full tiles, everything stored included")
    for column in ("codec", *(f"bits, d={d}" for d in HEAD_SIZES), "rotated", "scale per", "what", "source"):
        table.add_column(column, justify="right" if column.startswith("bits") else "left")
    for row in rows:
        block = row["scale_block"]
        table.add_row(
            row["name"],
            *(f"{row['bits'][str(d)]:.3f}" for d in HEAD_SIZES),
            "yes" if row["rotated"] else "no",
            f"{block} values" if block else ("vector" if row["code_bits"] else "-"),
            row["what"],
            row["source"],
        )
    console = output()
    console.print(table)
    console.print(
        "Options: scale=stored|norm|mse|unbiased (default norm) and search, of codecs with one scale for the vector;\n"
        "center=none|mean|tile of rotated ones (a cache: tile for keys, mean for values). So: tcq3:center=tile,search.",
        markup=False,
    )
