"""Which candidates are worth simulating: DistServe's two searches, ratios, mixed and hybrid."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING

from engine.messages import Role
from placement.planning.candidate import Candidate
from placement.planning.packing import copies_that_fit, units_that_fit
from placement.planning.plan import PoolPlan

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from placement.planning.costbook import CostBook, Cut
    from placement.planning.phases import Phase
    from placement.planning.plan import Target

LARGEST_UNIT = 8
"""Accelerators of a candidate; larger fleets hold copies of it."""
INSTANCES_OF_LARGE = 4
"""In a candidate of a model whose smallest instances would fill it: enough for the small ratios."""
MOST_INSTANCES = 8
"""Of one role in a candidate."""
KEPT_CUTS = 3
"""Of each phase, by what they serve per accelerator."""
KEPT_RATIOS = 2
MIXING_GAIN = 1.3
"""A batch of both phases reads the weights once: its time is less than the sum."""


@dataclass(frozen=True, slots=True)
class Prospect:
    """A candidate and the rate that mean loads allow it."""

    candidate: Candidate
    bound_rps: float

    @property
    def per_accelerator(self) -> float:
        return self.bound_rps / self.candidate.accelerators


class Search:
    def __init__(
        self,
        book: CostBook,
        phases: list[Phase],
        target: Target,
        token_budgets: tuple[int, ...],
        is_slow: Callable[[Cut, Cut], bool],
    ) -> None:
        """`is_slow` tells whether KV between two cuts suffers from crossing the network."""
        self._hardware, self._crowded = book.hardware, book.crowded
        self._budgets = token_budgets
        self._phases = phases
        self._is_slow = is_slow
        in_time = [p for p in phases if p.best_ttft_s <= target.ttft_s]
        self._prefills = _best(in_time, lambda p: p.prefill_rps)
        self._decodes = _best([p for p in phases if p.decode_rps > 0], lambda p: p.decode_rps)
        self._both = [p for p in in_time if p.decode_rps > 0]
        self._largest = _largest_units(phases)

    def prospects(self) -> list[Prospect]:
        """Everything worth simulating, the most promising first."""
        found = [*self._aggregated(), *self._high_affinity(), *self._low_affinity()]
        found += self._hybrids([p for p in found if len(p.candidate.pools) == 2])
        if self._crowded:
            found = [several for one in found for several in self._side_by_side(one)]
        unique = {p.candidate: p for p in found if self.copies(p.candidate) > 0}
        return sorted(unique.values(), key=lambda p: (-p.per_accelerator, str(p.candidate)))

    def copies(self, candidate: Candidate) -> int:
        """How many fit the fleet; where they would slow each other down, several are a candidate of
        their own, up to the largest."""
        if candidate.units is not None:
            return units_that_fit(self._hardware, candidate.pools)
        fit = self._fit(candidate)
        if self._crowded and candidate.accelerators * 2 <= self._most_of(candidate.by_device):
            return min(fit, 1)
        return fit

    def _fit(self, candidate: Candidate) -> int:
        return copies_that_fit(self._hardware, candidate.pools)

    def _side_by_side(self, prospect: Prospect) -> Iterator[Prospect]:
        """On one machine, where copies slow each other down: they are simulated together."""
        candidate = prospect.candidate
        most = min(
            self._fit(candidate), self._most_of(candidate.by_device) // candidate.accelerators
        )
        for number in range(1, max(most, 1) + 1):
            yield Prospect(candidate.times(number), prospect.bound_rps * number)

    def _most_of(self, devices: Iterable[str]) -> int:
        """Accelerators of a candidate on these kinds."""
        return max(self._largest[device] for device in devices)

    def _aggregated(self) -> Iterable[Prospect]:
        """Mixed instances, one and as many as the largest candidate may hold."""
        for phase, budget in product(self._both, self._budgets):
            fit = copies_that_fit(self._hardware, (PoolPlan(Role.MIXED, 1, phase.cut),))
            most = min(self._largest[phase.cut.device] // phase.cut.accelerators, fit)
            for count in sorted({1, min(4, most)} - {0}):
                pools = (PoolPlan(Role.MIXED, count, phase.cut),)
                yield self._prospect(Candidate(pools, budget))

    def _high_affinity(self) -> Iterable[Prospect]:
        """Each phase's best cuts, independently, in the ratios that balance them."""
        for prefill, decode in product(self._prefills, self._decodes):
            yield from self._balanced(prefill, decode, together=False)

    def _low_affinity(self) -> Iterable[Prospect]:
        """Both phases of a stage within one node, so that KV crosses its fast links only."""
        for prefill, decode in product(self._prefills, self._decodes):
            same = prefill.cut.device == decode.cut.device
            aligned = same and prefill.cut.pipeline == decode.cut.pipeline
            if aligned and self._is_slow(prefill.cut, decode.cut):
                yield from self._balanced(prefill, decode, together=True)

    def _balanced(self, prefill: Phase, decode: Phase, *, together: bool) -> Iterable[Prospect]:
        rates: dict[Prospect, float] = {}
        for n, m in self._ratios(prefill.cut, decode.cut):
            prospect = self._pair(prefill, n, decode, m, together=together)
            if self.copies(prospect.candidate) > 0:
                rates[prospect] = min(n * prefill.prefill_rps, m * decode.decode_rps)
        by_fleet = sorted(rates, key=lambda p: -rates[p] * self.copies(p.candidate))
        by_share = sorted(rates, key=lambda p: -rates[p] / p.candidate.accelerators)
        yield from dict.fromkeys([*by_share[:KEPT_RATIOS], *by_fleet[:1]])

    def _ratios(self, prefill: Cut, decode: Cut) -> Iterator[tuple[int, int]]:
        """One of each, however large, and as many as the largest candidate may hold."""
        most = self._most_of((prefill.device, decode.device))
        for n, m in product(range(1, MOST_INSTANCES + 1), repeat=2):
            if n == m == 1 or n * prefill.accelerators + m * decode.accelerators <= most:
                yield n, m

    def _pair(self, prefill: Phase, n: int, decode: Phase, m: int, *, together: bool) -> Prospect:
        pools = (PoolPlan(Role.PREFILL, n, prefill.cut), PoolPlan(Role.DECODE, m, decode.cut))
        return self._prospect(Candidate(pools, max(self._budgets), 1 if together else None))

    def _hybrids(self, pairs: list[Prospect]) -> Iterable[Prospect]:
        """The best split pools with one instance turned mixed, or one mixed instance more."""
        for pair in sorted(pairs, key=lambda p: -p.per_accelerator)[:KEPT_CUTS]:
            prefill, decode = pair.candidate.pools
            for cut in dict.fromkeys((decode.cut, prefill.cut)):
                yield from self._with_mixed(pair.candidate, cut)

    def _with_mixed(self, candidate: Candidate, cut: Cut) -> Iterable[Prospect]:
        by_cut = {phase.cut: phase for phase in self._both}
        if cut not in by_cut:
            return
        prefill, decode = candidate.pools
        for fewer_prefill, fewer_decode in ((0, 0), (1, 0), (0, 1)):
            n, m = prefill.instances - fewer_prefill, decode.instances - fewer_decode
            pools = [
                PoolPlan(pool.role, count, pool.cut)
                for pool, count in ((prefill, n), (decode, m))
                if count > 0
            ]
            if not pools:
                continue
            mixed = Candidate(
                (*pools, PoolPlan(Role.MIXED, 1, cut)), min(self._budgets), candidate.units
            )
            if mixed.accelerators <= self._most_of(mixed.by_device):
                yield self._prospect(mixed)

    def _prospect(self, candidate: Candidate) -> Prospect:
        """Instances that decode may spend time on prompts too, when those are what is short."""
        by_cut = {phase.cut: phase for phase in self._phases}
        bound = 0.0
        for step in range(21):
            prefill_rps = decode_rps = 0.0
            for pool in candidate.pools:
                phase = by_cut[pool.cut]
                share = step / 20 if pool.role.decodes else 1.0
                gain = MIXING_GAIN if pool.role.decodes else 1.0
                prefill_rps += pool.instances * share * phase.prefill_rps * gain
                decode_rps += pool.instances * (1 - share) * phase.decode_rps * gain
            bound = max(bound, min(prefill_rps, decode_rps))
        return Prospect(candidate, bound)


def _largest_units(phases: list[Phase]) -> dict[str, int]:
    """Accelerators of a candidate, by device; more where the smallest cut takes many."""
    smallest: dict[str, int] = {}
    for cut in (phase.cut for phase in phases):
        smallest[cut.device] = min(cut.accelerators, smallest.get(cut.device, cut.accelerators))
    return {
        device: max(LARGEST_UNIT, INSTANCES_OF_LARGE * taken) for device, taken in smallest.items()
    }


def _best(phases: list[Phase], rate: Callable[[Phase], float]) -> list[Phase]:
    """Per device, the cuts that serve most per accelerator, and the smallest."""
    kept: dict[Cut, Phase] = {}
    for device in dict.fromkeys(phase.cut.device for phase in phases):
        of_device = [phase for phase in phases if phase.cut.device == device]
        ranked = sorted(of_device, key=lambda p: (-rate(p) / p.cut.accelerators, p.cut))
        smallest = min(of_device, key=lambda p: (p.cut.accelerators, p.cut))
        for phase in (*ranked[:KEPT_CUTS], smallest):
            kept[phase.cut] = phase
    return list(kept.values())
