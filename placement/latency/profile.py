"""What `tandem profile` measured, and the latency models that follow from it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from engine.errors import BadConfig
from engine.messages import Role
from placement.latency.at_work import (
    AtWork,
    StepsAtWork,
    between_passes,
    cold_of,
    times_of,
    waits_of,
)
from placement.latency.machine import Machine
from placement.latency.measured import CarriedOver, fit_run

if TYPE_CHECKING:
    from collections.abc import Sequence

    from placement.latency.measured import FitReport, Measured, Run
    from placement.latency.model import LatencyModel
    from placement.latency.roofline import Roofline


@dataclass(frozen=True, slots=True)
class Profile:
    model: str
    device: str
    runs: tuple[Run, ...]
    transfers: tuple[tuple[float, float], ...] = ()
    """(bytes, seconds)."""
    steps: tuple[StepsAtWork, ...] = ()
    """Of instances in service."""
    paces: tuple[float, ...] = ()
    """How unsteady the machine was meanwhile."""
    way_s: float = 0.0
    """From a client to an instance and back, beyond passes with its prompt."""
    way_steps: float = 1.0
    """How many these are."""
    handoff_s: float = 0.0
    """A hand-off's messages, beyond its copy."""
    other_cores: float = 0.0
    """That others, which serve nothing, took at most while a server was measured."""
    role: Role = Role.MIXED
    """Of the instances whose latency it tells."""
    dtype: str | None = None
    """Of weights, as it was measured; None where an earlier version did not say."""
    kv_dtype: str | None = None
    threads: int | None = None

    @property
    def engine(self) -> dict[str, Any]:
        """How a config's engine section deploys what was measured."""
        narrow = None if self.kv_dtype == self.dtype else self.kv_dtype
        said = {"dtype": self.dtype, "kv_dtype": narrow, "threads": self.threads}
        return {key: value for key, value in said.items() if value is not None}

    def run(self, tensor_parallel: int, pipeline_parallel: int) -> Run | None:
        for run in self.runs:
            if (run.tensor_parallel, run.pipeline_parallel) == (tensor_parallel, pipeline_parallel):
                return run
        return None

    def check_fits(self, model: str, device: str) -> None:
        if self.model != model:
            raise BadConfig("profile.model", self.model, f"the plan is for {model!r}")
        if self.device != device:
            raise BadConfig("profile.device", self.device, f"the plan is for {device!r}")

    def latency(
        self, roofline: Roofline, tensor_parallel: int, pipeline_parallel: int
    ) -> tuple[LatencyModel, FitReport]:
        """The measured parallelism, or the nearest one carried over by the roofline's ratio."""
        run = self.run(tensor_parallel, pipeline_parallel)
        if run is not None:
            return self._served_run(run)
        nearest = min(
            self.runs,
            key=lambda r: (
                abs(r.tensor_parallel - tensor_parallel),
                abs(r.pipeline_parallel - pipeline_parallel),
            ),
        )
        measured, report = self._served_run(nearest)
        wanted = roofline.cut(tensor_parallel, pipeline_parallel)
        known = roofline.cut(nearest.tensor_parallel, nearest.pipeline_parallel)
        return CarriedOver(measured, known, wanted, pipeline_parallel), report

    def crowded(self, tensor_parallel: int, pipeline_parallel: int) -> LatencyModel | None:
        """Beside busy neighbours, where that was measured."""
        run = self.run(tensor_parallel, pipeline_parallel)
        if run is None or not run.crowded_samples:
            return None
        return self._served(fit_run(run.beside)[0], beside=True)

    def tells_of_service(self, tensor_parallel: int, pipeline_parallel: int) -> bool:
        """Unless servers were measured, but of another parallelism, where workers may get into each
        other's way as no pass by itself shows."""
        uncut = self.runs[0].tensor_parallel, self.runs[0].pipeline_parallel
        return not self.steps or (tensor_parallel, pipeline_parallel) == uncut

    @property
    def tells_of_neighbours(self) -> bool:
        return bool(self.steps) or any(run.crowded_samples for run in self.runs)

    def of_role(self, role: Role) -> Profile:
        """As it tells of instances that are mixed, or hand KV off to each other."""
        return replace(self, role=role)

    def machine(self, tensor_parallel: int, pipeline_parallel: int) -> Machine | None:
        """What instances share on their machine; None where no server was measured."""
        if not self.steps:
            return None
        return Machine(
            waits_of(self._alike),
            tensor_parallel * pipeline_parallel,
            cold_of(self._alike, self.in_service),
            self.paces,
        )

    @property
    def arrival_s(self) -> float:
        """From a client to an instance and back, beyond steps with its prompt: what lies between
        such a pass and the next is of the step."""
        between_s = between_passes(self._alike).of_step(1, prompts=True)
        return max(self.way_s - self.way_steps * between_s, 0.0)

    @property
    def in_service(self) -> AtWork:
        """An instance with the machine to itself, uncut; one after another if no server was
        measured."""
        return self._at_work(fit_run(self.runs[0])[0])

    def _at_work(self, passes: Measured, *, beside: bool = False) -> AtWork:
        times = times_of(self._alike, passes, beside=beside)
        between = between_passes(self._alike, beside=beside)
        return AtWork(passes, between, times, passes.pipeline_parallel)

    def _served(self, passes: Measured, *, beside: bool = False) -> LatencyModel:
        return self._at_work(passes, beside=beside) if self.steps else passes

    @property
    def _alike(self) -> Sequence[StepsAtWork]:
        """Steps of servers of such instances; of any where none was measured."""
        handed_off = self.role is not Role.MIXED
        return [one for one in self.steps if one.handed_off is handed_off] or self.steps

    def _served_run(self, run: Run) -> tuple[LatencyModel, FitReport]:
        passes, report = fit_run(run)
        return self._served(passes), report
