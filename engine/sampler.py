"""One token a sequence from the logits of a forward pass, vectorised over the batch."""

from __future__ import annotations

from math import isfinite
from typing import TYPE_CHECKING

import torch

from engine.batch import Drawn, Logprobs
from engine.drawing import (
    Filters,
    descending,
    draw,
    draw_filtered,
    highest,
    kth_highest,
    piece_maxima,
)
from engine.errors import BadLogits
from engine.logits import apply_options
from engine.random import uniforms

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from engine.batch import Draw
    from engine.grammar import GrammarCompiler
    from engine.request import Sampling

ROWS_IN_CACHE = 32
"""Rows that a CPU works on at a time: a few megabytes stay in its cache."""


class Sampler:
    """Stateless but for the grammars' caches: the same rows and draws give the same tokens."""

    def __init__(
        self,
        vocab_size: int,
        grammars: GrammarCompiler | None = None,
        eos: frozenset[int] = frozenset(),
    ) -> None:
        self.vocab_size = vocab_size
        self._grammars = grammars
        self._eos = eos

    @torch.inference_mode()
    def sample(
        self, logits: Tensor, draws: Sequence[Draw], request_ids: Sequence[str]
    ) -> list[Drawn]:
        """A token for each row of `logits`, which is overwritten.

        Log-probabilities are the model's own, before temperature, penalties and masks.
        """
        assert len(logits) == len(draws) == len(request_ids), (len(logits), len(draws))
        size = ROWS_IN_CACHE if logits.device.type == "cpu" else max(len(draws), 1)
        drawn: list[Drawn] = []
        for start in range(0, len(draws), size):
            part = slice(start, start + size)
            drawn += self._sample(logits[part], draws[part], request_ids[part])
        return drawn

    def is_bare(self, draw: Draw) -> bool:
        return draw.is_bare(self._eos)

    def _sample(
        self, logits: Tensor, draws: Sequence[Draw], request_ids: Sequence[str]
    ) -> list[Drawn]:
        rows = logits[:, : self.vocab_size].float()
        reported = [i for i, wanted in enumerate(draws) if wanted.sampling.logprobs is not None]
        raw = rows[reported] if reported else None
        apply_options(rows, draws, request_ids, self._grammars, self._eos)
        tokens = _choose(rows, draws, request_ids)
        told: dict[int, Logprobs] = {}
        if raw is not None:
            counts = [draws[i].sampling.logprobs or 0 for i in reported]
            logprobs = _logprobs(raw, [tokens[i] for i in reported], counts)
            told = dict(zip(reported, logprobs, strict=True))
        return [
            Drawn(name, token, told.get(i))
            for i, (name, token) in enumerate(zip(request_ids, tokens, strict=True))
        ]


def _choose(rows: Tensor, draws: Sequence[Draw], request_ids: Sequence[str]) -> list[int]:
    maxima, tokens = highest(rows)
    plain = [i for i, wanted in enumerate(draws) if _is_plain(wanted.sampling)]
    filtered = [i for i, wanted in enumerate(draws) if wanted.sampling.is_filtered]
    if plain:
        probabilities, uniform = _spread(rows, draws, plain)
        tokens[plain] = draw(probabilities, uniform)
    if filtered:
        probabilities, uniform = _spread(rows, draws, filtered)
        filters = _filters([draws[i].sampling for i in filtered], probabilities)
        tokens[filtered] = draw_filtered(probabilities, filters, uniform)
    _check(maxima.tolist(), request_ids)
    chosen: list[int] = tokens.tolist()
    return chosen


def _is_plain(sampling: Sampling) -> bool:
    return not sampling.is_greedy and not sampling.is_filtered


def _check(maxima: list[float], request_ids: Sequence[str]) -> None:
    if not all(map(isfinite, maxima)):
        bad = [n for n, top in zip(request_ids, maxima, strict=True) if not isfinite(top)]
        raise BadLogits(f"logits are not finite for {', '.join(bad)}")


def _spread(rows: Tensor, draws: Sequence[Draw], which: list[int]) -> tuple[Tensor, Tensor]:
    """The probabilities of the rows named, at their temperatures, and their random numbers."""
    chosen = rows if len(which) == len(rows) else rows[which]
    temperatures = [draws[i].sampling.temperature for i in which]
    if any(temperature != 1.0 for temperature in temperatures):
        chosen = chosen / chosen.new_tensor(temperatures)[:, None]
    numbers = uniforms([draws[i].sampling.seed for i in which], [draws[i].position for i in which])
    return torch.softmax(chosen, dim=1), torch.from_numpy(numbers).to(rows.device)


def _filters(samplings: Sequence[Sampling], probabilities: Tensor) -> Filters:
    size, device = probabilities.shape[1], probabilities.device
    top_k = [size if s.top_k is None else min(s.top_k, size) for s in samplings]
    return Filters(
        top_k=torch.tensor(top_k, device=device),
        top_p=probabilities.new_tensor([s.top_p for s in samplings]),
        min_p=probabilities.new_tensor([s.min_p for s in samplings]),
    )


def _logprobs(raw: Tensor, tokens: list[int], counts: list[int]) -> list[Logprobs]:
    """What the model thought of each token, and of the `counts` most likely ones."""
    total = raw.logsumexp(dim=1, keepdim=True)
    chosen = (raw.gather(1, torch.tensor(tokens, device=raw.device)[:, None]) - total)[:, 0]
    size = raw.shape[1]
    most = torch.tensor([min(max(count, 1), size) for count in counts], device=raw.device)
    values, index = descending(raw, kth_highest(piece_maxima(raw), most))
    widest = max(counts)
    likely = (values[:, :widest] - total).tolist()
    return [
        Logprobs(logprob, tuple(zip(ids[:count], values_[:count], strict=True)))
        for logprob, ids, values_, count in zip(
            chosen.tolist(), index[:, :widest].tolist(), likely, counts, strict=True
        )
    ]
