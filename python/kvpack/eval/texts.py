"""Texts to measure on, cut into windows that remember which document they come from.

The default text is the documentation that ships inside CPython (`pydoc_data.topics`): present wherever Python
is, long (460 kB), technical prose. It differs between Python versions, so its name carries the version.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import TextUnavailableError
from .models import Tokenizer

if TYPE_CHECKING:
    import torch

DEFAULT_TEXT = "topics"
WIKITEXT = "wikitext-2"
_CORPORA = {
    WIKITEXT: "corpora/wikitext-2-raw.test.txt",
    **{name: f"corpora/books/{name}.txt" for name in ("pride-and-prejudice", "moby-dick", "alice-in-wonderland")},
}
_ARTICLE = re.compile(r"^ = (?!=).+ = \n", re.MULTILINE)


@dataclass(frozen=True)
class Text:
    """A text as its documents, in order; joined they are the whole text."""

    name: str
    documents: tuple[str, ...]


@dataclass(frozen=True)
class Windows:
    """Token windows to score, each an int64 tensor [length]; `clusters` names each window's document."""

    name: str
    ids: tuple[torch.Tensor, ...]
    clusters: tuple[int, ...]

    def __iter__(self) -> Iterator[torch.Tensor]:
        return iter(self.ids)

    def __len__(self) -> int:
        return len(self.ids)


def _topics() -> Text:
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise TextUnavailableError(f"this Python ships no pydoc_data.topics ({error}): name a text file") from error
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    documents = tuple(topics[key].strip("\n") + "\n\n\n" for key in sorted(topics))
    return Text(f"pydoc_data.topics of Python {version}", documents)


def data_dir() -> Path | None:
    """Where corpora are looked for: $KVPACK_DATA."""
    named = os.environ.get("KVPACK_DATA")
    return Path(named).expanduser() if named else None


def load_text(name: str = DEFAULT_TEXT) -> Text:
    """The text called `name`: "topics", "wikitext-2", a book ("pride-and-prejudice", ...; both below $KVPACK_DATA),
    or the path of a UTF-8 file (one document).

    Raises TextUnavailableError naming what is allowed.
    """
    if name == DEFAULT_TEXT:
        return _topics()
    if name in _CORPORA:
        directory = data_dir()
        if directory is not None and (directory / _CORPORA[name]).is_file():
            return Text(name, _articles((directory / _CORPORA[name]).read_text(encoding="utf-8")))
        raise TextUnavailableError(
            f"{name} is not here: put it at $KVPACK_DATA/{_CORPORA[name]}, or use {DEFAULT_TEXT!r} or a file"
        )
    path = Path(name).expanduser()
    try:
        content = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        allowed = ", ".join(map(repr, (DEFAULT_TEXT, *_CORPORA)))
        raise TextUnavailableError(
            f"text {name!r} cannot be read ({error}); allowed: {allowed}, a UTF-8 file's path"
        ) from error
    if not content.strip():
        raise TextUnavailableError(f"text {name!r} is empty")
    return Text(path.name, (content,))


def _articles(content: str) -> tuple[str, ...]:
    starts = [match.start() for match in _ARTICLE.finditer(content)]
    if not starts:
        return (content,)
    cuts = [0, *starts[1:], len(content)]
    return tuple(content[a:b] for a, b in pairwise(cuts))


def cut_windows(text: Text, tokenizer: Tokenizer, length: int, count: int | None = None) -> Windows:
    """Windows of `length` tokens without overlap, evenly spread over the text; `count` None takes all.

    A window's cluster is the document in which it begins; in a text of one document every window is its own.
    A tokenizer that begins a text with a BOS token gets one at the start of every window.
    Raises TextUnavailableError if the text has fewer than `count` windows, ValueError for a bad size.
    """
    import torch

    if length < 2:
        raise ValueError(f"window length {length} is too short: at least 2 tokens")
    if count is not None and count < 1:
        raise ValueError(f"window count {count}: at least 1")
    body = length - (tokenizer.bos is not None)
    stream: list[int] = []
    ends: list[int] = []
    for content in text.documents:
        stream += tokenizer.encode(content)
        ends.append(len(stream))
    available = len(stream) // body
    if available < (count or 1):
        raise TextUnavailableError(
            f"{text.name} has {len(stream)} tokens: {available} windows of {length}, {count or 1} were asked for"
        )
    count = count or available
    ids: list[torch.Tensor] = []
    clusters: list[int] = []
    document = 0
    for i in range(count):
        start = (i * available // count) * body
        while ends[document] <= start:
            document += 1
        window = stream[start : start + body]
        ids.append(torch.tensor(window if tokenizer.bos is None else [tokenizer.bos, *window]))
        clusters.append(document if len(text.documents) > 1 else i)
    return Windows(text.name, tuple(ids), tuple(clusters))


def cut_places(text: Text, tokenizer: Tokenizer, length: int, counts: Sequence[int]) -> Windows:
    """For every number in `counts` a place in the text, evenly spread, and that many windows in a row from there.

    Places begin where a document does, if the text has several. A window's cluster is its place, so that windows
    which stand side by side are not taken for independent. Errors as `cut_windows`.
    """
    import torch

    if length < 2 or not counts or min(counts) < 1:
        raise ValueError(f"{list(counts)} windows of {length} tokens: at least 1 place, 1 window and 2 tokens")
    body = length - (tokenizer.bos is not None)
    stream: list[int] = []
    starts: list[int] = []
    for content in text.documents:
        starts.append(len(stream))
        stream += tokenizer.encode(content)
    room = max(counts) * body
    if len(stream) < len(counts) * room:
        raise TextUnavailableError(
            f"{text.name} has {len(stream)} tokens: too few for {len(counts)} places of {max(counts)} windows of "
            f"{length}"
        )
    ids: list[torch.Tensor] = []
    clusters: list[int] = []
    end = 0
    for place, count in enumerate(counts):
        wanted = max(end, place * (len(stream) - room) // max(1, len(counts) - 1))
        # The rest of the places must still fit behind this one.
        last = len(stream) - room * (len(counts) - place)
        start = min((s for s in starts if wanted <= s <= last), default=min(wanted, last))
        for i in range(count):
            window = stream[start + i * body : start + (i + 1) * body]
            ids.append(torch.tensor(window if tokenizer.bos is None else [tokenizer.bos, *window]))
            clusters.append(place)
        end = start + count * body
    return Windows(text.name, tuple(ids), tuple(clusters))
