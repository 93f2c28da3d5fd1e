"""The ways of running a model that are tested: transformers' modes of generation, and what users do with one cache.

A mode is a function of a `Run`, which knows the model and makes caches; it returns sequences, and the logits of every
step. Without a window, one tile is packed before the first step, and another one in the middle.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from transformers.generation.streamers import BaseStreamer

from ..hf import helpers as h
from .families import FAMILIES, model

PROMPT = 126
STEPS = 12


@dataclass
class Run:
    """One family under one attention implementation, and a maker of caches, called with the model's config.

    caches: all that were made, for a look at what happened in them.
    """

    family: str
    make: Callable[[Any], Any]
    attention: str = "default"
    caches: list[Any] = field(default_factory=list)

    @property
    def model(self) -> Any:
        return model(self.family, self.attention)

    def cache(self) -> Any:
        made = self.make(self.model.config)
        self.caches.append(made)
        return made

    def generate(self, ids: Tensor, new: int = STEPS, cache: Any = None, **options: Any) -> tuple[Tensor, list[Tensor]]:
        """ids: the prompt; of an encoder-decoder, the decoder's, after a short text for the encoder."""
        if FAMILIES[self.family].is_encoder_decoder:
            options = {"decoder_" * (name == "attention_mask") + name: x for name, x in options.items()}
            options["decoder_input_ids"] = ids
            ids = None if "inputs_embeds" in options else h.tokens(ids.shape[0], 20, seed=7)
        return h.generate(self.model, self.cache() if cache is None else cache, ids, new=new, **options)


@lru_cache
def draft(family: str) -> Any:
    """The model with its output layer disturbed: it drafts tokens of which some are accepted, and some rejected."""
    other = copy.deepcopy(model(family))
    weight = other.get_output_embeddings().weight
    torch.manual_seed(2)
    other.set_output_embeddings(torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False))
    other.get_output_embeddings().weight.data = weight + 0.7 * weight.std() * torch.randn_like(weight)
    return other


class Crops:
    """Counts the tokens that a cache is told to remove, where assisted generation rejects drafts."""

    def __init__(self, cache: Any) -> None:
        self.tokens = 0
        crop = cache.crop

        def counting(count: int) -> None:
            self.tokens -= count
            crop(count)

        cache.crop = counting


class Stream(BaseStreamer):  # type: ignore[misc]
    """Keeps what it is given."""

    def __init__(self) -> None:
        self.tokens: list[int] = []

    def put(self, value: Tensor) -> None:
        self.tokens += value.flatten().tolist()

    def end(self) -> None:
        self.tokens.append(-1)


Result = tuple[Tensor, list[Tensor]]


def greedy(run: Run) -> Result:
    return run.generate(h.tokens(1, PROMPT), new=20)


def batch(run: Run) -> Result:
    return run.generate(h.tokens(3, PROMPT))


def sampling(run: Run) -> Result:
    return run.generate(h.tokens(1, PROMPT), do_sample=True, top_k=20)


def several_sequences(run: Run) -> Result:
    return run.generate(h.tokens(1, PROMPT), do_sample=True, num_return_sequences=3)


def beam(run: Run) -> Result:
    return run.generate(h.tokens(2, PROMPT), num_beams=3)


def beam_sampling(run: Run) -> Result:
    return run.generate(h.tokens(1, PROMPT), num_beams=3, do_sample=True)


def assisted(run: Run) -> Result:
    cache = run.cache()
    crops = Crops(getattr(cache, "self_attention_cache", cache))
    out = run.generate(h.tokens(1, PROMPT), new=30, cache=cache, assistant_model=draft(run.family))
    assert crops.tokens > 0, "no draft was rejected"
    return out


def prompt_lookup(run: Run) -> Result:
    return run.generate(h.tokens(1, PROMPT // 3).repeat(1, 3), new=30, prompt_lookup_num_tokens=6)


def left_padded(run: Run) -> Result:
    ids, mask = h.padded([PROMPT, 31, PROMPT - 10])
    return run.generate(ids, attention_mask=mask)


def left_padded_beam(run: Run) -> Result:
    ids, mask = h.padded([PROMPT, 31])
    return run.generate(ids, attention_mask=mask, num_beams=2)


def turns(run: Run) -> Result:
    """Three questions to one cache."""
    cache, ids, logits = run.cache(), h.tokens(1, PROMPT), []
    for turn in range(3):
        ids, seen = run.generate(ids, new=8, cache=cache)
        logits += seen
        ids = torch.cat((ids, h.tokens(1, 20, seed=turn)), dim=1)
    return ids, logits


def chunked_prefill(run: Run) -> Result:
    return run.generate(h.tokens(1, 2 * PROMPT), prefill_chunk_size=50)


def chunked_prefill_padded(run: Run) -> Result:
    ids, mask = h.padded([2 * PROMPT, 40])
    return run.generate(ids, prefill_chunk_size=50, attention_mask=mask)


def inputs_embeds(run: Run) -> Result:
    """The prompt, or what an encoder reads, as vectors."""
    vectors = run.model.get_input_embeddings()(h.tokens(1, PROMPT))
    return run.generate(h.tokens(1, PROMPT), inputs_embeds=vectors)


def streaming(run: Run) -> Result:
    stream = Stream()
    ids, logits = run.generate(h.tokens(1, PROMPT), streamer=stream)
    assert stream.tokens[-STEPS - 1 :] == [*ids[0, -STEPS:].tolist(), -1]
    return ids, logits


def prefix(run: Run) -> Result:
    """A prompt is run once; copies of its cache go on with different texts."""
    start, cache = h.tokens(1, PROMPT), run.cache()
    ids, logits = run.generate(start, new=1, cache=cache)
    out = []
    for seed in (1, 2):
        copied = copy.deepcopy(cache)
        run.caches.append(copied)
        ids, seen = run.generate(torch.cat((start, h.tokens(1, 20, seed)), dim=1), cache=copied)
        out.append(ids)
        logits += seen
    return torch.cat(out), logits


MODES: dict[str, Callable[[Run], Result]] = {
    "greedy": greedy,
    "batch": batch,
    "sampling": sampling,
    "several sequences": several_sequences,
    "beam": beam,
    "beam sampling": beam_sampling,
    "assisted": assisted,
    "prompt look-up": prompt_lookup,
    "left-padded": left_padded,
    "left-padded beam": left_padded_beam,
    "turns": turns,
    "chunked prefill": chunked_prefill,
    "chunked prefill, padded": chunked_prefill_padded,
    "inputs_embeds": inputs_embeds,
    "streaming": streaming,
    "prefix": prefix,
}
