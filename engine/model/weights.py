"""Loading one rank's part of a checkpoint, each tensor read straight into its place."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from engine.errors import BadCheckpoint
from engine.model.config import NormKind
from engine.model.storage import OwnPieces
from engine.scaled import STORED, STORED_NAME, ScaledWeight, factors_of

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from engine.checkpoint import Checkpoint
    from engine.model.storage import Storage
    from engine.ops import Ops
    from engine.parallel import Parallel


@dataclass(slots=True)
class Linear:
    """A matrix ready for `Ops.linear`."""

    ops: Ops
    weight: torch.Tensor
    bias: torch.Tensor | None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self.ops.linear(self.weight, x, self.bias)


@dataclass(slots=True)
class ScaledLinear:
    """A matrix that stays in 8 bits, for `Ops.scaled_linear`."""

    ops: Ops
    weight: ScaledWeight
    bias: torch.Tensor | None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self.ops.scaled_linear(self.weight, x, self.bias)


Projection = Linear | ScaledLinear


@dataclass(slots=True)
class Norm:
    ops: Ops
    weight: torch.Tensor
    bias: torch.Tensor | None
    eps: float

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if self.bias is None:
            return self.ops.rms_norm(x, self.weight, self.eps)
        return self.ops.layer_norm(x, self.weight, self.bias, self.eps)

    def after_adding(self, x: torch.Tensor | None, residual: torch.Tensor) -> torch.Tensor:
        """Adds `x` to `residual` in place, then the norm of the sum."""
        if x is None:
            return self(residual)
        if self.bias is None:
            return self.ops.add_rms_norm(x, residual, self.weight, self.eps)
        residual += x
        return self(residual)


@dataclass(frozen=True, slots=True)
class Plane:
    """Which matrix is meant, where a tensor holds several of a kind."""

    index: int
    count: int


@dataclass(frozen=True, slots=True)
class Part:
    """The outputs `take` of a matrix with `outputs` of them."""

    name: str
    outputs: int
    take: range


class Loader:
    def __init__(
        self,
        checkpoint: Checkpoint,
        parallel: Parallel,
        ops: Ops,
        device: torch.device,
        dtype: torch.dtype,
        *,
        storage: Storage | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> None:
        """`progress` is told the bytes read so far. On the meta device, and where the storage is
        filled already, they are only counted."""
        self.config, self.names = checkpoint.config, checkpoint.names
        self.parallel, self.ops = parallel, ops
        self.device, self.dtype = device, dtype
        self._storage = storage or OwnPieces(device)
        self._tensors, self._progress = checkpoint.tensors, progress
        self.read_bytes = 0

    def __contains__(self, tensor: str) -> bool:
        return tensor in self._tensors

    def share(self, count: int) -> range:
        """This rank's even share of `count` things."""
        each = count // self.parallel.tensor_size
        return range(self.parallel.tensor_rank * each, (self.parallel.tensor_rank + 1) * each)

    def by_output(
        self,
        parts: Sequence[Part],
        inputs: int,
        *,
        biased: bool,
        transposed: bool = False,
        plane: Plane | None = None,
    ) -> Projection:
        """Parts of several matrices over the same input, fused into one."""
        scaled = self._is_scaled(parts[0].name)
        weight = self._matrix(sum(len(part.take) for part in parts), inputs, scaled=scaled)
        factors: list[torch.Tensor] = []
        bias = self._empty(weight.shape[0]) if biased else None
        row = 0
        for part, start, stored in _placed(parts):
            rows = slice(row, row + len(part.take))
            take = slice(start + part.take.start, start + part.take.stop)
            cut = (take, slice(None))
            self._read_matrix(
                part.name, (stored, inputs), cut, weight[rows], transposed=transposed, plane=plane
            )
            if bias is not None:
                self._read_vector(part.name + ".bias", stored, take, bias[rows])
            if scaled:
                rows_cut = range(take.start, take.stop), range(inputs)
                factors.append(self._factors(part.name, (stored, inputs), rows_cut))
            row += len(part.take)
        return self._projection(weight, factors, bias)

    def by_input(
        self,
        name: str,
        outputs: int,
        inputs: int,
        *,
        biased: bool,
        transposed: bool = False,
        plane: Plane | None = None,
    ) -> Projection:
        """A matrix over this rank's share of the inputs; only the first rank adds the bias."""
        share, scaled = self.share(inputs), self._is_scaled(name)
        weight = self._matrix(outputs, len(share), scaled=scaled)
        cut = (slice(None), slice(share.start, share.stop))
        self._read_matrix(name, (outputs, inputs), cut, weight, transposed=transposed, plane=plane)
        bias = None
        if biased and self.parallel.tensor_rank == 0:
            bias = self._empty(outputs)
            self._read_vector(name + ".bias", outputs, slice(None), bias)
        factors = []
        if scaled:
            factors.append(self._factors(name, (outputs, inputs), (range(outputs), share)))
        return self._projection(weight, factors, bias)

    def whole(self, name: str, outputs: int, inputs: int) -> Projection:
        """A small matrix that every rank holds."""
        return self.by_output([Part(name, outputs, range(outputs))], inputs, biased=False)

    def table(self, name: str, rows: int, width: int, take: range) -> torch.Tensor:
        """Rows of an embedding; those past its end are zero, so that ranks hold equally many."""
        table = self._empty(len(take), width)
        present = slice(take.start, min(take.stop, rows))
        count = max(0, present.stop - present.start)
        if count:
            self._read_matrix(name, (rows, width), (present, slice(None)), table[:count])
        if not self._storage.filled:
            table[count:] = 0
        return table

    def scale(self, names: Sequence[str]) -> float:
        """A factor that is stored under one of several names, or 1 where none is."""
        for name in names:
            if name in self:
                stored = self._tensors.whole(name)
                if stored.numel() != 1 or not 0 < float(stored) < float("inf"):
                    raise BadCheckpoint(name, stored.tolist(), "must be one number above 0")
                return float(stored)
        return 1.0

    def number(self, value: float) -> torch.Tensor:
        """Rounded as the model's own numbers are."""
        return torch.tensor(value, dtype=self.dtype, device=self.device)

    def norm(self, name: str, width: int | None = None) -> Norm:
        """Norm weights are kept in fp32, their offset added."""
        config = self.config
        width = config.hidden if width is None else width
        weight = self._vector(name + ".weight", width)
        if not self._storage.filled:
            weight += config.norm_offset
        bias = self._vector(name + ".bias", width) if config.norm is NormKind.LAYER else None
        return Norm(self.ops, weight, bias, config.norm_eps)

    def _vector(self, name: str, size: int) -> torch.Tensor:
        vector = self._storage.take((size,), torch.float32)
        self._read_vector(name, size, slice(None), vector)
        return vector

    def _projection(
        self, weight: torch.Tensor, factors: list[torch.Tensor], bias: torch.Tensor | None
    ) -> Projection:
        if factors:
            scaled = ScaledWeight(weight, torch.cat(factors))
            if self.ops.keeps(scaled):
                return ScaledLinear(self.ops, scaled, bias)
            weight = scaled.plain(self.dtype)
        return Linear(self.ops, self.ops.prepare_weight(weight), bias)

    def _is_scaled(self, name: str) -> bool:
        scaling = self.config.scaling
        return scaling is not None and f"{name}.weight{scaling.suffix}" in self._tensors

    def _factors(self, name: str, shape: tuple[int, int], cut: tuple[range, range]) -> torch.Tensor:
        assert self.config.scaling is not None, name
        factors = factors_of(self._tensors, name + ".weight", self.config.scaling, shape, cut)
        return factors.to(self.device)

    def _empty(self, *shape: int) -> torch.Tensor:
        return self._storage.take(shape, self.dtype)

    def _matrix(self, outputs: int, inputs: int, *, scaled: bool) -> torch.Tensor:
        return self._storage.take((outputs, inputs), STORED if scaled else self.dtype)

    def _read_vector(self, name: str, size: int, take: slice, into: torch.Tensor) -> None:
        self._read(name, (size,), (take,), into)

    def _read_matrix(
        self,
        name: str,
        shape: tuple[int, int],
        cut: tuple[slice, slice],
        into: torch.Tensor,
        *,
        transposed: bool = False,
        plane: Plane | None = None,
    ) -> None:
        """Reads rows and columns of a matrix that may be stored the other way round."""
        if transposed:
            shape, cut, into = shape[::-1], cut[::-1], into.t()
        if plane is None:
            self._read(name + ".weight", shape, cut, into)
        else:
            one = slice(plane.index, plane.index + 1)
            self._read(name, (plane.count, *shape), (one, *cut), into[None])

    def _read(
        self, name: str, shape: tuple[int, ...], cut: tuple[slice, ...], into: torch.Tensor
    ) -> None:
        self._tensors.expect(name, shape)
        stored = self._tensors.dtype(name)
        if (stored == STORED_NAME) != (into.dtype == STORED):
            rule = f"must be {STORED_NAME} with factors beside it, or neither"
            raise BadCheckpoint(name, stored, rule)
        if not (into.is_meta or self._storage.filled):
            self._tensors.read(name, cut, into)
        self.read_bytes += into.nbytes
        if self._progress is not None:
            self._progress(self.read_bytes)


def _placed(parts: Sequence[Part]) -> list[tuple[Part, int, int]]:
    """Each part with its first output in, and the outputs of, the matrix it is stored in."""
    stored: dict[str, int] = {}
    starts = []
    for part in parts:
        starts.append(stored.get(part.name, 0))
        stored[part.name] = starts[-1] + part.outputs
    return [(part, start, stored[part.name]) for part, start in zip(parts, starts, strict=True)]
