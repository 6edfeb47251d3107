"""What `tandem profile` measured, and the latency models that follow from it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from engine.errors import BadConfig
from placement.latency.measured import CarriedOver, fit_run
from placement.latency.serving_costs import (
    Machine,
    Served,
    ServingCosts,
    WithServing,
    at_speed_of,
    fit_doors,
    fit_serving,
    handing_of,
    handoff_of,
    way_of,
)

if TYPE_CHECKING:
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
    served: tuple[Served, ...] = ()
    processors: int | None = None
    threads: int = 1
    """Of each rank."""

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
        return self._with_serving(fit_run(run.beside)[0])

    def machine(self, tensor_parallel: int, pipeline_parallel: int) -> Machine | None:
        """What instances share with what serves their tokens; None where that was not measured."""
        doors = fit_doors(self._told)
        if doors is None or self.processors is None:
            return None
        return Machine(self.processors, self.threads * tensor_parallel * pipeline_parallel, doors)

    @property
    def arrival_s(self) -> float:
        """From the client to an instance and back, beyond the passes; 0 where not measured."""
        alone = self._served_by(1)
        if not alone:
            return 0.0
        return way_of(alone, self._with_serving(fit_run(self.runs[0])[0]))

    @property
    def handing_s(self) -> float:
        """How much longer a prompt takes whose KV is handed off; 0 where not measured."""
        return handing_of(self._told)

    @property
    def handoff_s(self) -> float:
        """Of its messages, beyond the copy; 0 where not measured."""
        served = [one for one in self._told if one.handed_off]
        return handoff_of(served, self._with_serving(fit_run(self.runs[0])[0]))

    def _served_by(self, instances: int) -> list[Served]:
        return [one for one in self._told if one.instances == instances and not one.handed_off]

    @property
    def _told(self) -> list[Served]:
        """What each server did, at the speed at which the passes were timed."""
        run, found = self.runs[0], list[Served]()
        alone = fit_run(run)[0]
        beside = fit_run(run.beside)[0] if run.crowded_samples else alone
        for server in dict.fromkeys((one.instances, one.handed_off) for one in self.served):
            loops = [one for one in self.served if (one.instances, one.handed_off) == server]
            found += at_speed_of(alone if server[0] == 1 else beside, loops)
        return found

    @property
    def serving(self) -> ServingCosts | None:
        """What an instance's own thread does beside its passes; None where not measured."""
        alone = self._served_by(1)
        return fit_serving(alone, fit_run(self.runs[0])[0]) if alone else None

    def _with_serving(self, passes: Measured) -> LatencyModel:
        costs = self.serving
        return passes if costs is None else WithServing(passes, costs)

    def _served_run(self, run: Run) -> tuple[LatencyModel, FitReport]:
        passes, report = fit_run(run)
        return self._with_serving(passes), report
