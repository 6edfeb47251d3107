"""Reads profiles that `tandem profile` wrote.

A profile is JSON: `model` (name), `device`, `dtype`, `kv_bytes_per_token`, and `runs`, one for
each parallelism: `tensor_parallel`, `pipeline_parallel`, `kv_capacity_tokens`, and samples
`prefill` (tokens, squares, seconds; optionally prompts, context), `decode` (batch, context,
seconds), `mixed` (the fields of both), where context sums the KV tokens already there, and
`beside`, the same while `neighbours` others compute on the machine; `transfer` (bytes, seconds);
and `serving` (instances, users, prompt_tokens, output_tokens, ttft_s, tpot_s; optionally requests,
loops_s, doors_s, passes_s, prefill_s, handed_off), as clients of a server on this machine see it,
whose instances compute on so many `threads` of its `processors`.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from engine.errors import BadConfig, unknown_name
from placement.latency.measured import Run, Sample
from placement.latency.model import Step
from placement.latency.profile import Profile
from placement.latency.serving_costs import Served

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path


def read_profile(path: Path) -> Profile:
    if not path.is_file():
        raise BadConfig("profile", str(path), "no such file")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise BadConfig("profile", str(path), f"not JSON: {error}") from error
    return profile_from(content)


def profile_from(content: object) -> Profile:
    if not isinstance(content, dict):
        raise BadConfig("profile", type(content).__name__, "must be a JSON object")
    for key in ("model", "device", "runs"):
        if key not in content:
            raise BadConfig(f"profile.{key}", None, "is required")
    entries = _mappings("profile.runs", content["runs"])
    runs = tuple(_run(f"profile.runs[{i}]", raw) for i, raw in enumerate(entries))
    if not runs:
        raise BadConfig("profile.runs", 0, "at least one")
    transfers = tuple(
        (_number("profile.transfer", raw, "bytes"), _number("profile.transfer", raw, "seconds"))
        for raw in _mappings("profile.transfer", content.get("transfer", []))
    )
    served = tuple(
        _served(f"profile.serving[{i}]", raw)
        for i, raw in enumerate(_mappings("profile.serving", content.get("serving", [])))
    )
    processors = content.get("processors")
    return Profile(
        str(content["model"]),
        str(content["device"]),
        runs,
        transfers,
        served,
        None if processors is None else _count("profile", content, "processors"),
        _count("profile", content, "threads", 1),
    )


def _served(where: str, raw: Mapping[str, Any]) -> Served:
    ttft_s, tpot_s = (_number(where, raw, key) for key in ("ttft_s", "tpot_s"))
    if min(ttft_s, tpot_s) <= 0:
        raise BadConfig(where, dict(raw), "needs positive seconds")
    return Served(
        instances=_count(where, raw, "instances"),
        users=_count(where, raw, "users"),
        prompt_tokens=_count(where, raw, "prompt_tokens"),
        output_tokens=_count(where, raw, "output_tokens"),
        ttft_s=ttft_s,
        tpot_s=tpot_s,
        requests=int(_number(where, raw, "requests", 0)),
        doors_s=_number(where, raw, "doors_s", 0),
        loops_s=_number(where, raw, "loops_s", 0),
        prefill_s=_number(where, raw, "prefill_s", 0),
        handed_off=bool(raw.get("handed_off")),
        passes_s=_number(where, raw, "passes_s", 0),
    )


def _count(where: str, raw: Mapping[str, Any], key: str, default: int | None = None) -> int:
    return max(int(_number(where, raw, key, default)), 1)


def _mappings(where: str, value: object) -> list[Mapping[str, Any]]:
    if not isinstance(value, list) or not all(isinstance(one, dict) for one in value):
        raise BadConfig(where, value, "must be a list of objects")
    return value


def _run(where: str, raw: Mapping[str, Any]) -> Run:
    known = {
        "tensor_parallel",
        "pipeline_parallel",
        "kv_capacity_tokens",
        "prefill",
        "decode",
        "mixed",
        "beside",
    }
    for key in raw:
        if key not in known:
            raise unknown_name(where, key, known)
    samples, beside = _samples(where, raw), raw.get("beside") or {}
    crowded = _samples(f"{where}.beside", beside) if beside else ()
    capacity = raw.get("kv_capacity_tokens")
    return Run(
        int(raw.get("tensor_parallel", 1)),
        int(raw.get("pipeline_parallel", 1)),
        None if capacity is None else int(capacity),
        samples,
        crowded,
        int(_number(f"{where}.beside", beside, "neighbours", 0)),
    )


def _samples(where: str, raw: Mapping[str, Any]) -> tuple[Sample, ...]:
    samples = tuple(
        _sample(f"{where}.{kind}[{i}]", entry)
        for kind in ("prefill", "decode", "mixed")
        for i, entry in enumerate(_mappings(f"{where}.{kind}", raw.get(kind, [])))
    )
    if len(samples) < 4:
        raise BadConfig(where, len(samples), "at least 4 samples are needed")
    return samples


def _sample(where: str, raw: Mapping[str, Any]) -> Sample:
    """A pass of prompts, of decodes, or both; `context` sums the KV tokens already there."""
    tokens = int(_number(where, raw, "tokens", 0))
    squares = int(_number(where, raw, "squares", 0))
    batch = int(_number(where, raw, "batch", 0))
    context = int(_number(where, raw, "context", 0))
    prompts = int(_number(where, raw, "prompts", 1 if tokens else 0))
    pairs = int(_number(where, raw, "pairs", (squares + tokens) // 2))
    seconds = _number(where, raw, "seconds")
    if tokens + batch < 1 or seconds <= 0:
        raise BadConfig(where, dict(raw), "needs tokens or batch, and positive seconds")
    mixed = tokens > 0 and batch > 0
    return Sample(Step(tokens + batch, prompts + batch, pairs, context, mixed), seconds)


def _number(where: str, raw: Mapping[str, Any], key: str, default: float | None = None) -> float:
    value = raw.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or value < 0:
        raise BadConfig(f"{where}.{key}", value, "must be a number of at least 0")
    return float(value)
