"""The tables of docs/quality.md and the picture beside them, from the lines of `kvpack.eval.quality_store`."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

from .formats import figure, kld, number, percent
from .metrics import Interval
from .quality import ANCHOR, FAKE, LONG, PEER, SHORT
from .quality_defaults import defaults_table
from .quality_store import Line, Store, by_position, figures, ratio
from .sweeps import pareto

BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"
_HEADS = "| windows | PPL | KLD mean | median | p99 | top-1 % |"


class Report:
    """What the store holds of one model, window size and number of sinks.

    about: fields that lines must have (model, version). length, window, sinks: of the main table.
    """

    def __init__(self, store: Store, about: Mapping[str, Any], *, length: int, window: int, sinks: int) -> None:
        self.store, self.about = store, dict(about)
        self.length, self.window, self.sinks = length, window, sinks
        self.exact = {line["sample"]: line for line in store.find("exact", **self.about)}

    def lines(self, study: str, **wanted: Any) -> dict[str, list[Line]]:
        """Window lines of a study by the cache's label; of ours only those with this window and these sinks."""
        out: dict[str, dict[str, Line]] = {}
        for line in self.store.find("window", study=study, **self.about, **wanted):
            if (line["peer"] or self._wanted(line)) and line["sample"] in self.exact:
                # The newest wins: a codec may have changed since an older one.
                out.setdefault(line["label"], {})[line["sample"]] = line
        return {label: list(lines.values()) for label, lines in out.items()}

    def _wanted(self, line: Line) -> bool:
        """Whether a line of ours has the window and the sinks of this report."""
        return (line["window"], line["sinks"]) == (self.window, self.sinks)

    def bytes(self) -> dict[str, Line]:
        """What caches hold after a window of the main table, by label."""
        found = self.store.find("bytes", length=self.length, **self.about)
        return {line["label"]: line for line in found if line["peer"] or self._wanted(line)}

    # Tables.

    def markdown(self) -> str:
        """All tables that there are lines for."""
        parts = [self._main(), self._trellis(), self._peers(), self._anchor(), self._long(), self._needle()]
        own = {"length": self.length, "window": self.window, "sinks": self.sinks}
        parts.append(defaults_table(self.store, self.about, self.exact, **own))
        return "\n\n".join(part for part in parts if part)

    def _main(self) -> str:
        found = self.lines(SHORT, length=self.length)
        if not found:
            return ""
        some = next(iter(found.values()))[0]
        sums = {label: figures(lines, self.exact) for label, lines in found.items()}
        held = self.bytes()
        first = next(iter(sums.values()))
        texts = ", ".join(dict.fromkeys(line["text"] for lines in found.values() for line in lines))
        rows = [
            f"**Every codec**: {self.about['model']}; {texts}; windows of {self.length} tokens, positions "
            f"{some['first']} to {self.length - 2} scored; mode `{some['mode']}`, window {self.window}, "
            f"{self.sinks} sinks. Exact PPL {number(first['ppl_exact'])}. KLD in nats per token against the exact "
            f"cache, ± half of a 95 % interval, clustered by place. Bits: of full tiles, codes, scales and all "
            f"metadata; held: everything in the cache after {self.length - 1} tokens of a 16-bit model, window and "
            "sinks included, per value.",
            "",
            f"| codec | bits | held {_HEADS}",
            "|---|---|---|---|---|---|---|---|---|",
        ]
        for label in sorted(sums, key=lambda label: -(held[label]["bits"] if label in held else 0)):
            rows.append(f"| `{label}` | {_held(held, label)} {self._cells(sums[label])}")
        return "\n".join(rows)

    def _cells(self, found: Mapping[str, Any]) -> str:
        return (
            f"| {found['windows']} | {number(found['ppl'])} | {kld(found['kld'])} "
            f"| {figure(found['kld_median'].value)} | {figure(found['kld_p99'].value)} | {percent(found['top1'])} |"
        )

    def _trellis(self) -> str:
        """Trellis codes over the Lloyd-Max codes of the same bits, scale rule and centring."""
        by_mode = {"emulated": self.lines(SHORT, length=self.length), "fake": self.lines(FAKE, length=self.length)}
        rows = []
        for label in by_mode["emulated"]:
            plain = label.replace("tcq", "tq", 1)
            ratios = [
                ratio(found[label], found[plain], self.exact) if {label, plain} <= found.keys() else None
                for found in by_mode.values()
            ]
            if label != plain and any(ratios):
                fake = by_mode["fake"].get(label)
                alone = kld(figures(fake, self.exact)["kld"]) if fake else "-"
                cells = ["-" if one is None else number(one) for one in ratios]
                rows.append(f"| `{label}` / `{plain}` | {cells[0]} | {cells[1]} | {alone} |")
        if not rows:
            return ""
        heads = "| codecs | ratio, `emulated` | ratio, `fake` | KLD of the first, `fake` |\n|---|---|---|---|\n"
        return (
            "**Trellis codes against Lloyd-Max codes** of the same bits, scale rule and centring: the ratio of mean "
            "KLDs, paired by token. In mode `fake` every token but the sinks is coded, the newest too.\n\n"
            f"{heads}" + "\n".join(sorted(rows, reverse=True))
        )

    def _peers(self) -> str:
        theirs, common = self.lines(PEER, length=self.length), self._common()
        if common is None:
            return ""
        some = next(iter(theirs.values()))[0]
        held = self.bytes()
        rows = [
            f"**Beside transformers' quantized caches**, the same windows for all, at the bits per value that each "
            f"really holds after {self.length - 1} tokens of a 16-bit model. Rows in mode `chunked` ran through "
            f"the real cache: a first call of {some['prompt']} tokens, then {some['chunk']} a call, whose own tokens "
            "are exact.",
            "",
            f"| cache | mode | held {_HEADS}",
            "|---|---|---|---|---|---|---|---|---|",
        ]
        table = []
        for study in (SHORT, PEER):
            for label, lines in self.lines(study, length=self.length).items():
                chosen = [line for line in lines if line["sample"] in common]
                if not chosen:
                    continue
                bits = held[label]["held"] if label in held else float("nan")
                name = label if chosen[0]["peer"] else f"`{label}`"
                cells = self._cells(figures(chosen, self.exact))
                table.append((bits, f"| {name} | {chosen[0]['mode']} | {_bits(bits)} {cells}"))
        rows += [row for _, row in sorted(table, key=lambda pair: -pair[0] if pair[0] == pair[0] else 0)]
        return "\n".join(rows)

    def _common(self) -> set[str] | None:
        """The windows that every cache in the peers' own mode ran; None without such caches."""
        found = self.lines(PEER, length=self.length).values()
        return set.intersection(*({line["sample"] for line in lines} for lines in found)) if found else None

    def _anchor(self) -> str:
        found = {mode: self.lines(ANCHOR, mode=mode) for mode in ("stepwise", "emulated")}
        labels = [label for label in found["stepwise"] if label in found["emulated"]]
        if not labels:
            return ""
        some = found["stepwise"][labels[0]][0]
        rows = [
            f"**Anchor**: the same tokens, token by token through the fused kernel (`stepwise`) and in mode "
            f"`emulated`, after a first call of {some['prompt']} tokens.",
            "",
            "| codec | tokens | KLD stepwise | KLD emulated | top-1 % stepwise | emulated |",
            "|---|---|---|---|---|---|",
        ]
        for label in labels:
            samples = [{line["sample"] for line in found[mode][label]} for mode in found]
            both = samples[0] & samples[1]
            if not both:
                continue
            a, b = (
                figures([line for line in found[mode][label] if line["sample"] in both], self.exact) for mode in found
            )
            rows.append(
                f"| `{label}` | {a['tokens']} | {kld(a['kld'])} | {kld(b['kld'])} | {percent(a['top1'])} "
                f"| {percent(b['top1'])} |"
            )
        return "\n".join(rows)

    def _long(self) -> str:
        parts = []
        for length in sorted({line["length"] for line in self.store.find("window", study=LONG, **self.about)}):
            found = self.lines(LONG, length=length)
            if not found:
                continue
            some = next(iter(found.values()))[0]
            edges = [some["first"]]
            while edges[-1] < length:
                edges.append(min(length, 1 << edges[-1].bit_length()))
            spans = [f"{a} to {b - 1}" for a, b in pairwise(edges)]
            count = max(map(len, found.values()))
            rows = [
                f"**Long windows**: {length} tokens, {count} windows, mode `{some['mode']}`; mean KLD by the position "
                "of the query.",
                "",
                f"| codec | {' | '.join(spans)} |",
                "|---" * (len(spans) + 1) + "|",
            ]
            for label, lines in found.items():
                cells = [_maybe(x) for x in by_position(lines, self.exact, edges)]
                rows.append(f"| `{label}` | {' | '.join(cells)} |")
            parts.append("\n".join(rows))
        return "\n\n".join(parts)

    def _needle(self) -> str:
        lines = [
            line for line in self.store.find("needle", **self.about) if line["window"] is None or self._wanted(line)
        ]
        if not lines:
            return ""
        depths = sorted({line["depth"] for line in lines})
        length = ", ".join(str(x) for x in sorted({line["length"] for line in lines}))
        rows = [
            f"**Passkey** at {length} tokens, by its depth in the text: how often greedy generation gives it back.",
            "",
            f"| cache | {' | '.join(f'{depth:.0%}' for depth in depths)} | all |",
            "|---" * (len(depths) + 2) + "|",
        ]
        for label in dict.fromkeys(line["label"] for line in lines):
            cells = []
            for wanted in ([depth] for depth in depths):
                hits = [line["found"] for line in lines if line["label"] == label and line["depth"] in wanted]
                cells.append(f"{sum(hits)}/{len(hits)}")
            hits = [line["found"] for line in lines if line["label"] == label]
            rows.append(f"| `{label}` | {' | '.join(cells)} | {sum(hits)}/{len(hits)} |")
        return "\n".join(rows)

    # The picture.

    def points(self) -> list[tuple[str, bool, float, Interval]]:
        """(label, is a peer, bits held per value, mean KLD) of the caches of the main table, those with options left
        out, and of the peers, over the windows that the peers ran too, if there are any.
        """
        held, common = self.bytes(), self._common()
        out = []
        for study in (SHORT, PEER):
            for label, found in self.lines(study, length=self.length).items():
                lines = [line for line in found if common is None or line["sample"] in common]
                if lines and label in held and ":" not in label and (study == SHORT or lines[0]["peer"]):
                    bits, mean = float(held[label]["held"]), figures(lines, self.exact)["kld"]
                    out.append((label, bool(lines[0]["peer"]), bits, mean))
        return out

    def draw(self, path: Path) -> bool:
        """Bits held per value against mean KLD, ours and the peers', the Pareto front ringed. False if matplotlib
        is missing, or there is nothing to draw.
        """
        points = self.points()
        try:
            import matplotlib
        except ImportError:
            return False
        if not points:
            return False
        matplotlib.use("Agg")
        import matplotlib.pyplot as plt

        picture, axes = plt.subplots(figsize=(9, 6), dpi=120)
        for is_peer, name, marker in ((False, "kvpack, mode emulated", "o"), (True, "transformers, chunked", "s")):
            chosen = [(bits, mean) for _, theirs, bits, mean in points if theirs == is_peer]
            if chosen:
                low = [mean.value - max(mean.low, 1e-9) if mean.low == mean.low else 0.0 for _, mean in chosen]
                high = [mean.high - mean.value if mean.high == mean.high else 0.0 for _, mean in chosen]
                at, values = [bits for bits, _ in chosen], [mean.value for _, mean in chosen]
                reach = [[max(0.0, x) for x in low], [max(0.0, x) for x in high]]
                axes.errorbar(at, values, yerr=reach, fmt=marker, ms=5, capsize=2, lw=1, label=name)
        front = pareto([(bits, mean.value) for _, _, bits, mean in points])
        ringed = [points[i][2] for i in front], [points[i][3].value for i in front]
        axes.plot(*ringed, "o", ms=11, mfc="none", mec="black", label="Pareto front")
        axes.set_yscale("log")
        axes.set_xlabel(f"bits per value held after {self.length - 1} tokens, everything included (16-bit model)")
        axes.set_ylabel("mean KLD to the exact cache, nats per token")
        axes.set_title(f"{self.about['model']}, window {self.window}, {self.sinks} sinks", fontsize=9)
        axes.grid(True, which="both", alpha=0.25)
        axes.legend()
        picture.tight_layout()  # labels are placed by pixels: nothing may move after it
        _annotate(axes, [(label, bits, mean.value) for label, _, bits, mean in points])
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.savefig(path)
        plt.close(picture)
        return True


def _annotate(axes: Any, points: list[tuple[str, float, float]]) -> None:
    """Labels to the right of their points, from the top, each below those that it would cover."""
    placed: list[tuple[float, float, float]] = []  # left, right, middle
    for label, x, y in sorted(points, key=lambda point: -point[2]):
        at, up = axes.transData.transform((x, y))
        left, right, middle = at + 8, at + 8 + 6 * len(label), up + 2
        while any(left < r and lo < right and abs(middle - m) < 11 for lo, r, m in placed):
            middle -= 1
        placed.append((left, right, middle))
        axes.annotate(label, (left, middle), xycoords="figure pixels", fontsize=7, va="center")


def _held(held: Mapping[str, Line], label: str) -> str:
    line = held.get(label)
    return "- | -" if line is None else f"{line['bits']:.3f} | {_bits(line['held'])}"


def _bits(x: float) -> str:
    return f"{x:.2f}" if x == x else "-"


def _maybe(x: Interval | None) -> str:
    return "-" if x is None else kld(x)


def write_doc(path: Path, content: str) -> None:
    """Put the tables between the markers of a Markdown file. ValueError if it has none."""
    text = path.read_text(encoding="utf-8")
    begin, end = text.find(BEGIN), text.find(END)
    if begin < 0 or end < begin:
        raise ValueError(f"{path} has no lines {BEGIN!r} and {END!r}, between which the tables belong")
    path.write_text(text[: begin + len(BEGIN)] + f"\n\n{content}\n\n" + text[end:], encoding="utf-8")
