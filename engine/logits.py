"""What a request's options do to its logits before a token is chosen.

The order is vLLM's: grammar, logit bias, min_tokens, then repetition, presence and frequency
penalties. Each is written to the few entries concerned, in place.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray
    from torch import Tensor

    from engine.batch import Draw
    from engine.grammar import GrammarCompiler
    from engine.request import Sampling

NEVER = float("-inf")
log = logging.getLogger(__name__)


def apply_options(
    rows: Tensor,
    draws: Sequence[Draw],
    request_ids: Sequence[str],
    grammars: GrammarCompiler | None,
    eos: frozenset[int],
) -> None:
    """Changes `rows` in place; rows without options are not touched."""
    forbidden = [draw.forbidden_ends(eos) for draw in draws]
    guided = [i for i, draw in enumerate(draws) if draw.sampling.grammar is not None]
    if guided:
        assert grammars is not None, "a sampler without a GrammarCompiler was given a grammar"
        masks = [
            _mask(grammars, request_ids[i], draws[i], forbidden[i], rows.shape[1]) for i in guided
        ]
        mask = torch.from_numpy(np.stack(masks)).to(rows.device)
        rows[guided] = rows[guided].masked_fill(~mask, NEVER)
    _add_biases(rows, draws)
    free = {
        i: ends for i, ends in enumerate(forbidden) if ends and draws[i].sampling.grammar is None
    }
    _forbid(rows, free)
    _penalize(rows, draws)


def _mask(
    grammars: GrammarCompiler,
    request_id: str,
    draw: Draw,
    forbidden: tuple[int, ...],
    vocabulary: int,
) -> NDArray[np.bool_]:
    """What the grammar allows, less early ends unless only an end would be left."""
    assert draw.sampling.grammar is not None
    output = draw.history[draw.prompt_tokens :]
    matcher = grammars.matcher(request_id, draw.sampling.grammar, output)
    if matcher.error:
        log.warning("grammar failed, answer ends request=%s error=%s", request_id, matcher.error)
    allowed = grammars.allowed(matcher)[:vocabulary]
    lasting = allowed.copy()
    lasting[list(forbidden)] = False
    return lasting if lasting.any() else allowed


def _add_biases(rows: Tensor, draws: Sequence[Draw]) -> None:
    entries = [
        (i, token, bias) for i, draw in enumerate(draws) for token, bias in draw.sampling.logit_bias
    ]
    if not entries:
        return
    row, token, bias = zip(*entries, strict=True)
    at = _at(rows, row, token)
    rows.index_put_(at, torch.tensor(bias, dtype=rows.dtype, device=rows.device), accumulate=True)


def _forbid(rows: Tensor, tokens: dict[int, tuple[int, ...]]) -> None:
    entries = [(i, token) for i, ends in tokens.items() for token in ends]
    if entries:
        row, token = zip(*entries, strict=True)
        rows.index_put_(_at(rows, row, token), rows.new_tensor(NEVER))


def _at(rows: Tensor, row: Sequence[int], token: Sequence[int]) -> tuple[Tensor, Tensor]:
    return torch.tensor(row, device=rows.device), torch.tensor(token, device=rows.device)


def _penalize(rows: Tensor, draws: Sequence[Draw]) -> None:
    """Repetition covers prompt and output; presence and frequency the output only."""
    repeating = [i for i, draw in enumerate(draws) if draw.sampling.repetition_penalty != 1.0]
    if repeating:
        row, token, _ = _tally(rows.shape[1], {i: draws[i].history for i in repeating})
        factor = _per_row(rows, draws, row, "repetition_penalty")
        at = _on_device(rows, row, token)
        seen = rows[at]
        rows[at] = torch.where(seen > 0, seen / factor, seen * factor)
    counting = [i for i, draw in enumerate(draws) if _counts(draw.sampling)]
    if counting:
        outputs = {i: draws[i].history[draws[i].prompt_tokens :] for i in counting}
        row, token, times = _tally(rows.shape[1], outputs)
        presence = _per_row(rows, draws, row, "presence_penalty")
        frequency = _per_row(rows, draws, row, "frequency_penalty")
        rows[_on_device(rows, row, token)] -= presence + frequency * rows.new_tensor(times)


def _counts(sampling: Sampling) -> bool:
    return sampling.presence_penalty != 0.0 or sampling.frequency_penalty != 0.0


def _tally(
    vocabulary: int, tokens: dict[int, tuple[int, ...]]
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Each (row, token) that occurs, once, and how often."""
    keys = [np.array(seen, dtype=np.int64) + row * vocabulary for row, seen in tokens.items()]
    unique, times = np.unique(np.concatenate(keys), return_counts=True)
    row, token = np.divmod(unique, vocabulary)
    return row, token, times


def _per_row(rows: Tensor, draws: Sequence[Draw], row: NDArray[np.int64], name: str) -> Tensor:
    values = np.array([getattr(draw.sampling, name) for draw in draws], dtype=np.float32)
    return torch.from_numpy(values[row]).to(rows.device)


def _on_device(
    rows: Tensor, row: NDArray[np.int64], token: NDArray[np.int64]
) -> tuple[Tensor, ...]:
    return torch.from_numpy(row).to(rows.device), torch.from_numpy(token).to(rows.device)
