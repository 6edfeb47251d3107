"""Which cuts of the model are worth simulating, from the mean load of each phase alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from engine.errors import NoFeasiblePlan
from placement.latency.model import Step, pairs_of, prefill_step
from placement.planning.costbook import Cut

if TYPE_CHECKING:
    from placement.latency.catalog import NodeGroup
    from placement.latency.model import LatencyModel
    from placement.planning.costbook import CostBook
    from placement.planning.plan import Target
    from placement.workload import Workload

Tokens = NDArray[np.int64]
MOST_DECODES = 256
GIGABYTE = 1e9


@dataclass(frozen=True, slots=True)
class Phase:
    """What a cut could serve of one phase at most, were load perfectly even."""

    cut: Cut
    prefill_rps: float
    decode_rps: float
    best_ttft_s: float
    """Of the prompt at the attainment's quantile, alone."""
    best_tpot_s: float
    """Of a sequence alone."""


def feasible_cuts(book: CostBook, workload: Workload) -> list[Cut]:
    """Every cut whose memory holds the weights and the longest request."""
    longest = workload.longest_context
    cuts = [cut for group in book.hardware.groups for cut in _cuts(book, group)]
    fitting = [cut for cut in cuts if book.kv_tokens(cut) >= longest]
    if not fitting:
        raise _no_memory(book, cuts, longest)
    return fitting if book.pipelined else _shallowest(fitting)


def cuts_in_service(book: CostBook, cuts: list[Cut]) -> list[Cut]:
    """Those of which profiles say how they do in service; all of them if that is none."""
    return [cut for cut in cuts if book.knows_in_service(cut)] or cuts


def _cuts(book: CostBook, group: NodeGroup) -> list[Cut]:
    """Tensor ranks of a node that divide the model; powers of two of stages, over nodes too."""
    threads = book.threads(group.device.name)
    workers = group.devices_per_node // threads
    return [
        Cut(group.device.name, tensor, pipeline, threads)
        for tensor in range(1, workers + 1)
        for pipeline in _powers_of_two(workers // tensor * group.nodes)
        if book.shape.splits_into(tensor, pipeline)
    ]


def _powers_of_two(most: int) -> list[int]:
    powers, power = [], 1
    while power <= most:
        powers.append(power)
        power *= 2
    return powers


def _shallowest(cuts: list[Cut]) -> list[Cut]:
    """Stages that take turns only add memory: the fewest that fit, for each tensor size."""
    least: dict[tuple[str, int], Cut] = {}
    for cut in cuts:
        key = cut.device, cut.tensor
        if key not in least or cut.pipeline < least[key].pipeline:
            least[key] = cut
    return list(least.values())


def _no_memory(book: CostBook, cuts: list[Cut], longest: int) -> NoFeasiblePlan:
    most = max(cuts, key=book.free_bytes, default=None)
    if most is None:
        return _no_cut(book)
    needed = book.shape.weight_bytes + longest * book.shape.kv_bytes_per_token
    has = book.free_bytes(most) + book.shape.weight_bytes
    rule = (
        f"{book.shape.name} needs {needed / GIGABYTE:.1f} GB for weights and a request of "
        f"{longest} tokens; the most one instance gets is {has / GIGABYTE:.1f} GB ({most}), "
        f"{(needed - has) / GIGABYTE:.1f} GB short"
    )
    return NoFeasiblePlan("memory", book.shape.weight_bytes, rule)


def _no_cut(book: CostBook) -> NoFeasiblePlan:
    most = max(book.hardware.groups, key=lambda group: group.devices_per_node)
    threads = book.threads(most.device.name)
    if threads > most.devices_per_node:
        rule = f"each worker takes so many cores, of which a node has {most.devices_per_node}"
        return NoFeasiblePlan("threads", threads, rule)
    rule = "its heads cannot be divided over any accelerators here"
    return NoFeasiblePlan("parallelism", book.shape.name, rule)


def phase_of(book: CostBook, cut: Cut, workload: Workload, target: Target) -> Phase:
    latency = book.latency(cut)
    prompts = _computed_tokens(workload)
    at_quantile = int(np.quantile(prompts, target.attainment))
    seconds = [latency.stage_s(prefill_step([(int(n), 0)])) for n in _sample(prompts)]
    context = _mean_context(workload)
    outputs = float(np.maximum(workload.output_tokens - 1, 0).mean())
    return Phase(
        cut,
        1 / float(np.mean(seconds)) if book.pipelined else _batched_rps(latency, prompts),
        _decode_rps(latency, context, outputs, book.kv_tokens(cut), target.tpot_s),
        latency.prefill_s([(at_quantile, 0)]),
        latency.decode_s([int(context)]),
    )


def _computed_tokens(workload: Workload) -> Tokens:
    """Of each prompt, if every prefix that others share were cached: the least there may be."""
    if workload.prefix_id is None or workload.prefix_tokens is None:
        return workload.prompt_tokens
    shared = np.where(workload.prefix_id >= 0, workload.prefix_tokens, 0)
    return np.maximum(workload.prompt_tokens - shared, 1)


def _sample(values: Tokens) -> list[int]:
    step = max(1, len(values) // 200)
    sample: list[int] = np.sort(values)[::step].tolist()
    return sample


def _batched_rps(latency: LatencyModel, prompts: Tokens) -> float:
    """Prompts a second when each pass carries enough of them to be worth its fixed cost."""
    tokens = float(prompts.mean())
    pairs = float(np.mean([pairs_of(int(n), 0) for n in _sample(prompts)]))
    rates = []
    for count in (1, 4, 16):
        step = Step(int(count * tokens), count, int(count * pairs))
        rates.append(count / latency.stage_s(step))
    return max(rates)


def _mean_context(workload: Workload) -> float:
    """Over all decode steps: a long answer is in more of them."""
    outputs = workload.output_tokens.astype(float)
    middle = workload.prompt_tokens + outputs / 2
    return float((middle * outputs).sum() / outputs.sum())


def _decode_rps(
    latency: LatencyModel, context: float, outputs: float, kv_tokens: int, tpot_s: float
) -> float:
    """By Little's law: the largest batch within the target and memory, over its answers' time."""
    best = 0.0
    most = min(MOST_DECODES, int(kv_tokens / max(context, 1.0)))
    batch = 1
    while batch <= most:
        step_s = latency.step_s(Step(batch, batch, 0, int(batch * context)))
        if step_s > tpot_s:
            break
        best = max(best, batch / (step_s * max(outputs, 1e-9)))
        batch += max(1, batch // 8)
    return best


def check_targets(phases: list[Phase], target: Target) -> None:
    """Refuses targets that even an idle instance misses, and says by how much."""
    fastest = min(phases, key=lambda phase: phase.best_ttft_s)
    if fastest.best_ttft_s > target.ttft_s:
        raise _misses("ttft_s", target.ttft_s, fastest.best_ttft_s, fastest.cut, "first token")
    fastest = min(phases, key=lambda phase: phase.best_tpot_s)
    if fastest.best_tpot_s > target.tpot_s:
        raise _misses("tpot_s", target.tpot_s, fastest.best_tpot_s, fastest.cut, "decode step")


def _misses(name: str, wanted_s: float, best_s: float, cut: Cut, what: str) -> NoFeasiblePlan:
    excess = best_s / wanted_s - 1
    rule = (
        f"the fastest {what} takes {best_s:.4g} s, idle, with {cut}: {excess:.0%} over the target"
    )
    return NoFeasiblePlan(f"slo.{name}", wanted_s, rule)
