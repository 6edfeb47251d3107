"""Compares the latency model with published measurements; prints the errors docs/latency.md quotes.

Each line: samples, then the error of the roofline as the catalog has it (median of its absolute
value, and of its sign: how much too fast or slow), then of a robust fit to these samples.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from placement.latency.catalog import find_device, find_link, find_model  # noqa: E402
from placement.latency.measured import Run, Sample, fit_run  # noqa: E402
from placement.latency.model import Step, decode_step, prefill_step  # noqa: E402
from placement.latency.roofline import Roofline  # noqa: E402
from placement.published.distserve_rules import Parallel, stage_rules  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Iterable

DATA = ROOT.parent / "shared" / "data"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=DATA)
    data = parser.parse_args().data
    print(f"{'measured by':44} {'n':>5}  roofline |e| (bias)   fitted |e| p50, p90")
    check_operators(data)
    check_collectives(data)
    check_distserve()
    check_splitwise(data)
    return 0


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def roofline(model: str, device: str, tensor: int) -> Roofline:
    known = find_device(device)
    return Roofline(find_model(model), known, find_link(known.link), tensor)


def line(title: str, errors: Iterable[float], fitted: tuple[float, float] | None = None) -> None:
    array = np.array(list(errors))
    text = f"{title:44} {len(array):5}  {np.median(np.abs(array)):7.1%} ({np.median(array):+.1%})"
    if fitted is not None:
        text += f"      {fitted[0]:7.1%} {fitted[1]:7.1%}"
    print(text)


def check_operators(data: Path) -> None:
    """One layer's matrices, by tokens and tensor ranks."""
    kinds = {"a100": "a100-80gb", "h100": "h100-80gb"}
    models = {
        "Llama-2-70b-hf": "llama-2-70b",
        "Llama-2-7b-hf": "llama-2-7b",
        "Meta-Llama-3-8B": "llama-3.1-8b",
    }
    for path in sorted((data / "vidur_profiling").glob("*_mlp.csv")):
        kind, _, rest = path.stem.partition("_")
        errors = []
        for row in rows_of(path):
            name = models[rest.removesuffix("_mlp")]
            model = roofline(name, kinds[kind], int(row["num_tensor_parallel_workers"]))
            measured_ms = sum(
                float(row[f"time_stats.{op}.median"])
                for op in ("attn_pre_proj", "attn_post_proj", "mlp_up_proj", "mlp_down_proj")
            )
            errors.append(matrices_s(model, int(row["num_tokens"])) * 1e3 / measured_ms - 1)
        line(f"Vidur, {path.stem}", errors)


def matrices_s(model: Roofline, tokens: int) -> float:
    shape, ranks = model.shape, model.tensor_parallel
    half = shape.attention_parameters / 2 / ranks
    feed_forward, each = shape.expert_parameters / ranks, shape.matrix_bytes_each
    return 2 * model.matrix_s(tokens, half, half * each) + model.matrix_s(
        tokens, feed_forward, feed_forward * each
    )


def check_collectives(data: Path) -> None:
    links = {"H100-SXM-80GB": "nvlink4", "H200-SXM-141GB": "nvlink4"}
    for device, name in links.items():
        link = find_link(name)
        for operation in ("all_reduce", "sendrecv"):
            errors = []
            for row in rows_of(data / "collectives" / f"{device}_{operation}.csv"):
                size = float(row["size(kb)"]) * 1024
                ranks = int(row["num_nodes"]) * int(row["num_gpus_per_node"])
                reduces = operation == "all_reduce"
                ours = link.all_reduce_s(size, ranks) if reduces else link.transfer_s(size)
                errors.append(ours / (float(row["time(us)"]) * 1e-6) - 1)
            line(f"APEX, {device} {operation}", errors)
    check_vidur_network(data, "a100_dgx", "nvlink3")
    check_vidur_network(data, "h100_dgx", "nvlink4")


def check_vidur_network(data: Path, cluster: str, name: str) -> None:
    link, errors = find_link(name), []
    for row in rows_of(data / "vidur_profiling" / f"net_{cluster}_all_reduce.csv"):
        ranks = int(row["num_workers"])
        if ranks == int(row["devices_per_node"]):
            ours = link.all_reduce_s(float(row["size"]), ranks)
            errors.append(ours / (float(row["time_stats.all_reduce.median"]) * 1e-3) - 1)
    line(f"Vidur, {cluster} all_reduce in a node", errors)


def check_distserve() -> None:
    """DistServe's fitted lines over the sizes they were fitted for, as if they were samples."""
    for model, tensors in (("opt-13b", (1, 2, 4)), ("opt-66b", (2, 4, 8))):
        for tensor in tensors:
            rules = stage_rules("distserve", model, Parallel(tensor, 1))
            ours = roofline(model, "a100-80gb", tensor)
            samples: list[Sample] = []
            a, b, c = rules.times.prefill
            samples += [
                Sample(prefill_step([(n, 0)]), a + b * n + c * n * n)
                for n in (64, 128, 256, 512, 1024, 1536, 2048)
            ]
            for batch in (1, 4, 16, 48, 90, 100, 128):
                times = rules.times
                small = batch < times.large_batch_from
                a, b, c = times.decode_small_batch if small else times.decode_large_batch
                for context in (128, 512, 1024):
                    seconds = a + b * batch * context + c * batch
                    samples.append(Sample(decode_step([context] * batch), seconds))
            compare(f"DistServe, {model} TP{tensor} on A100", ours, samples)


def check_splitwise(data: Path) -> None:
    """Prompt and token times of vLLM on DGX machines."""
    names = {"llama2-70b": "llama-2-70b", "bloom-176b": "bloom-176b"}
    groups: dict[tuple[str, str, int], list[Sample]] = defaultdict(list)
    for row in rows_of(data / "splitwise_perf_model.csv"):
        if row["hardware"].endswith("pcap"):
            continue
        key = names[row["model"]], row["hardware"], int(row["tensor_parallel"])
        prompt, batch = int(row["prompt_size"]), int(row["batch_size"])
        context = prompt + int(row["token_size"]) // 2
        groups[key] += [
            Sample(prefill_step([(prompt, 0)] * batch), float(row["prompt_time"]) / 1e3),
            Sample(decode_step([context] * batch), float(row["token_time"]) / 1e3),
        ]
    for (model, hardware, tensor), samples in sorted(groups.items()):
        title = f"Splitwise, {model} TP{tensor} on {hardware}"
        compare(title, roofline(model, hardware, tensor), samples)


def compare(title: str, ours: Roofline, samples: list[Sample]) -> None:
    _, report = fit_run(Run(ours.tensor_parallel, 1, None, tuple(samples)))
    for kind, chosen in (("prefill", _is_prefill), ("decode", _is_decode)):
        errors = [ours.step_s(s.step) / s.seconds - 1 for s in samples if chosen(s.step)]
        fitted = (report.median_error, report.p90_error) if kind == "decode" else None
        line(f"{title}, {kind}", errors, fitted)


def _is_prefill(step: Step) -> bool:
    return step.pairs > 0


def _is_decode(step: Step) -> bool:
    return step.pairs == 0


if __name__ == "__main__":
    sys.exit(main())
