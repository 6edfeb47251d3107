"""Choosing one token a row: the highest, or by inverse CDF with one uniform number a row.

One uniform keyed by (seed, position) was preferred to Gumbel noise keyed by (seed, position,
token): noise costs a Philox evaluation, some eighty integer operations, for every logit, while
one number a row is drawn on the host for next to nothing. Each row is summed alone, a piece at a
time in fp32 and the pieces in fp64: a token never depends on its row's neighbours, and two
devices differ only where a draw falls within rounding of the border between two tokens.

Nothing is sorted but the few tokens that can survive a filter. Rows are cut into pieces of
`PIECE` tokens: the highest token lies in the highest piece, the drawn one in the piece where the
CDF crosses, and the k highest are not below the k-th highest piece maximum.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from engine import kernels
from engine.native_library import load_library

PIECE = 128
SAFETY = 0.99
"""Keeps tokens whose probability rounding might have put just under a bound."""
SMALLEST = torch.finfo(torch.float32).tiny


def highest(rows: Tensor) -> tuple[Tensor, Tensor]:
    """The maximum of each row and the lowest index that holds it; not finite if NaN is there."""
    library = load_library() if rows.device.type == "cpu" else None
    if library is not None and rows.dtype == torch.float32 and rows.stride(1) == 1:
        return kernels.highest(library, rows)
    return highest_piece(rows)


def highest_piece(rows: Tensor) -> tuple[Tensor, Tensor]:
    """`highest` in plain torch."""
    peaks = piece_maxima(rows)
    maxima, piece = peaks.max(dim=1, keepdim=True)
    inside, _ = _piece(rows, piece, float("-inf"))
    index = piece * PIECE + (inside == maxima).int().argmax(dim=1, keepdim=True)
    return maxima[:, 0], index[:, 0]


def _pieces(rows: Tensor) -> Tensor:
    return rows.view(rows.shape[0], -1, PIECE)


def piece_maxima(rows: Tensor) -> Tensor:
    body = rows.shape[1] // PIECE * PIECE
    parts = [_pieces(rows[:, :body]).amax(dim=2)] if body else []
    if body < rows.shape[1]:
        parts.append(rows[:, body:].amax(dim=1, keepdim=True))
    return torch.cat(parts, dim=1)


def _piece_sums(rows: Tensor) -> Tensor:
    body = rows.shape[1] // PIECE * PIECE
    parts = [_pieces(rows[:, :body]).sum(dim=2)] if body else []
    if body < rows.shape[1]:
        parts.append(rows[:, body:].sum(dim=1, keepdim=True))
    return torch.cat(parts, dim=1).double()


def _piece(rows: Tensor, piece: Tensor, beyond: float) -> tuple[Tensor, Tensor]:
    """The values and indices of one piece a row; `beyond` stands past the row's end."""
    index = piece * PIECE + torch.arange(PIECE, device=rows.device)
    inside = rows.gather(1, index.clamp(max=rows.shape[1] - 1))
    return inside.masked_fill(index >= rows.shape[1], beyond), index


def draw(weights: Tensor, uniform: Tensor) -> Tensor:
    """The index where each row's CDF crosses its uniform number: never one of weight zero."""
    sums = _piece_sums(weights)
    cdf = sums.cumsum(dim=1)
    crossing = uniform[:, None] * cdf[:, -1:]
    piece = (cdf <= crossing).sum(dim=1, keepdim=True)
    before = cdf.gather(1, piece) - sums.gather(1, piece)
    inside, index = _piece(weights, piece, 0.0)
    place = (inside.double().cumsum(dim=1) <= crossing - before).sum(dim=1, keepdim=True)
    last = PIECE - 1 - (inside > 0).flip(1).int().argmax(dim=1, keepdim=True)
    return index.gather(1, place.minimum(last))[:, 0]


@dataclass(frozen=True, slots=True)
class Filters:
    """One value a row; `top_k` is the vocabulary's size where it is off."""

    top_k: Tensor
    top_p: Tensor
    min_p: Tensor

    def only_top_p(self, vocabulary: int) -> Tensor:
        return (self.min_p == 0) & (self.top_k >= vocabulary)


def draw_filtered(probabilities: Tensor, filters: Filters, uniform: Tensor) -> Tensor:
    """Like `draw` after min-p, top-k and top-p, each over what the one before left."""
    values, index = descending(probabilities, _lower_bound(probabilities, filters))
    kept = _filtered(values, filters, probabilities.shape[1])
    cdf = kept.double().cumsum(dim=1)
    place = (cdf <= uniform[:, None] * cdf[:, -1:]).sum(dim=1, keepdim=True)
    return index.gather(1, place)[:, 0]


def _lower_bound(probabilities: Tensor, filters: Filters) -> Tensor:
    """A probability under which no token survives the filters.

    All tokens under (1 - top_p) / vocabulary together weigh less than 1 - top_p. That holds for
    the whole row only, so it is not used where min-p or top-k come first.
    """
    vocabulary = probabilities.shape[1]
    peaks = piece_maxima(probabilities)
    by_min_p = filters.min_p * peaks.amax(dim=1) * SAFETY
    by_top_k = kth_highest(peaks, filters.top_k)
    negligible = (1 - filters.top_p) / vocabulary * SAFETY
    by_top_p = torch.where(filters.only_top_p(vocabulary), negligible, 0.0)
    return torch.stack([by_min_p, by_top_k, by_top_p]).amax(dim=0).clamp(min=SMALLEST)


def kth_highest(peaks: Tensor, k: Tensor) -> Tensor:
    """The k-th highest piece maximum of each row; -inf where there are not so many pieces."""
    pieces = peaks.shape[1]
    within = k <= pieces
    most = int(torch.where(within, k, 0).max())
    if most == 0:
        return peaks.new_full((peaks.shape[0],), float("-inf"))
    ranked = peaks.topk(most, dim=1).values
    kth = ranked.gather(1, k.clamp(max=most)[:, None] - 1)[:, 0]
    return torch.where(within, kth, float("-inf"))


def descending(rows: Tensor, bound: Tensor) -> tuple[Tensor, Tensor]:
    """Each row's values that reach its bound, highest first and lower index first, and where.

    Shorter rows end in -inf.
    """
    row, index = (rows >= bound[:, None]).nonzero(as_tuple=True)
    counts = torch.bincount(row, minlength=rows.shape[0])
    starts = counts.cumsum(dim=0) - counts
    place = torch.arange(len(row), device=rows.device) - starts[row]
    shape = (rows.shape[0], int(counts.max()))
    values, where = rows.new_full(shape, float("-inf")), index.new_zeros(shape)
    values[row, place], where[row, place] = rows[row, index], index
    values, order = values.sort(dim=1, descending=True, stable=True)
    return values, where.gather(1, order)


def _filtered(values: Tensor, filters: Filters, vocabulary: int) -> Tensor:
    """Sorted probabilities with zero for what the filters remove; the first always stays."""
    rank = torch.arange(values.shape[1], device=values.device)
    values = values.clamp(min=0.0)
    cut = (values < filters.min_p[:, None] * values[:, :1]) | (rank >= filters.top_k[:, None])
    values = values.masked_fill(cut, 0.0)
    cdf = values.double().cumsum(dim=1)
    left = torch.where(filters.only_top_p(vocabulary), 1.0, cdf[:, -1])
    nucleus = (filters.top_p * left)[:, None]
    return values.masked_fill(cdf - values >= nucleus, 0.0)
