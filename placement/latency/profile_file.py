"""Reads profiles that `tandem profile` wrote.

A profile is JSON: `model` (name), `device`, optionally `dtype`, `kv_dtype` and `threads` (of the
engine that was measured), and `runs`, one for each parallelism: `tensor_parallel`,
`pipeline_parallel`, `kv_capacity_tokens`, and samples
`prefill` (tokens, squares, seconds; optionally prompts, context), `decode` (batch, context,
seconds), `mixed` (the fields of both), where context sums the KV tokens already there, and
`beside`, the same while `neighbours` others compute on the machine; `transfer` (bytes, seconds);
`at_work`, of servers under load the means over `steps` that were alike (count, tokens, draws,
pairs, kv_read_tokens, processor_s; optionally waited_s, others, cold, mixed, followed, then_s),
with `handed_off` and optionally `way_s`, `way_steps`, `handoff_s` and `other_cores`; and `speed`,
whose `paces` tell how unsteady the machine was.
"""

from __future__ import annotations

import json
from math import inf
from statistics import median
from sys import float_info
from typing import TYPE_CHECKING, Any

from engine.errors import BadConfig, check_names, unknown_name
from engine.layout import DTYPE_BYTES
from placement.latency.at_work import StepsAtWork
from placement.latency.measured import Run, Sample
from placement.latency.model import Step
from placement.latency.profile import Profile

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path


PROFILE_KEYS = (
    *("model", "device", "dtype", "kv_dtype", "threads", "kv_bytes_per_token"),
    *("runs", "transfer", "at_work", "speed"),
)
SAMPLE_KINDS = ("prefill", "decode", "mixed")
BESIDE_KEYS = ("neighbours", *SAMPLE_KINDS)
RUN_KEYS = ("tensor_parallel", "pipeline_parallel", "kv_capacity_tokens", *SAMPLE_KINDS, "beside")


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
    if "serving" in content:
        rule = "was measured by an earlier version: profile again"
        raise BadConfig("profile.serving", type(content["serving"]).__name__, rule)
    check_names("profile", content, PROFILE_KEYS)
    entries = _mappings("profile.runs", content["runs"])
    runs = tuple(_run(f"profile.runs[{i}]", raw) for i, raw in enumerate(entries))
    if not runs:
        raise BadConfig("profile.runs", 0, "at least one")
    transfers = tuple(
        (_positive("profile.transfer", raw, "bytes"), _positive("profile.transfer", raw, "seconds"))
        for raw in _mappings("profile.transfer", content.get("transfer", []))
    )
    at_work = _mappings("profile.at_work", content.get("at_work", []))
    steps = tuple(
        _step_at_work(f"profile.at_work[{i}].steps[{j}]", raw, server)
        for i, server in enumerate(at_work)
        for j, raw in enumerate(_mappings(f"profile.at_work[{i}].steps", server.get("steps")))
    )
    way_s, handoff_s = (_median_of(at_work, key) for key in ("way_s", "handoff_s"))
    way_steps = _median_of(at_work, "way_steps", 1.0)
    other_cores = [_number("profile.at_work", one, "other_cores", 0) for one in at_work]
    return Profile(
        _text("profile.model", content["model"]),
        _text("profile.device", content["device"]),
        runs,
        transfers,
        steps,
        _paces(content.get("speed")),
        way_s,
        way_steps,
        handoff_s,
        max(other_cores, default=0.0),
        dtype=_dtype(content, "dtype"),
        kv_dtype=_dtype(content, "kv_dtype"),
        threads=_count("profile", content, "threads") if "threads" in content else None,
    )


def _dtype(content: Mapping[str, Any], key: str) -> str | None:
    name = content.get(key)
    if name is not None and (not isinstance(name, str) or name not in DTYPE_BYTES):
        raise unknown_name(f"profile.{key}", str(name), DTYPE_BYTES)
    return name


def _step_at_work(where: str, raw: Mapping[str, Any], server: Mapping[str, Any]) -> StepsAtWork:
    tokens, draws, pairs, read = (
        round(_number(where, raw, key)) for key in ("tokens", "draws", "pairs", "kv_read_tokens")
    )
    return StepsAtWork(
        _count(where, raw, "count"),
        Step(tokens, draws, pairs, read, bool(raw.get("mixed"))),
        _positive(where, raw, "processor_s"),
        _number(where, raw, "waited_s", 0),
        _number(where, raw, "others", 0),
        bool(raw.get("cold")),
        int(_number(where, raw, "followed", 0)),
        _number(where, raw, "then_s", 0),
        bool(server.get("handed_off")),
    )


def _median_of(servers: Sequence[Mapping[str, Any]], key: str, default: float = 0.0) -> float:
    """Over those that tell it: one may have been disturbed."""
    known = [_number("profile.at_work", one, key) for one in servers if key in one]
    return median(known) if known else default


def _paces(speed: object) -> tuple[float, ...]:
    if speed is None:
        return ()
    paces = speed.get("paces") if isinstance(speed, dict) else None
    if not isinstance(paces, list) or not all(_is_positive(pace) for pace in paces):
        raise BadConfig("profile.speed.paces", paces, "must be a list of positive numbers")
    return tuple(paces)


def _is_positive(value: object) -> bool:
    return isinstance(value, int | float) and 0 < value < inf


def _count(where: str, raw: Mapping[str, Any], key: str, default: int | None = None) -> int:
    return max(int(_number(where, raw, key, default)), 1)


def _mappings(where: str, value: object) -> list[Mapping[str, Any]]:
    if not isinstance(value, list) or not all(isinstance(one, dict) for one in value):
        raise BadConfig(where, value, "must be a list of objects")
    return value


def _run(where: str, raw: Mapping[str, Any]) -> Run:
    check_names(where, raw, RUN_KEYS)
    samples, beside = _samples(where, raw), raw.get("beside") or {}
    if not isinstance(beside, dict):
        raise BadConfig(f"{where}.beside", beside, "must be an object")
    check_names(f"{where}.beside", beside, BESIDE_KEYS)
    crowded = _samples(f"{where}.beside", beside) if beside else ()
    unknown = raw.get("kv_capacity_tokens") is None
    return Run(
        _whole(where, raw, "tensor_parallel", 1),
        _whole(where, raw, "pipeline_parallel", 1),
        None if unknown else _whole(where, raw, "kv_capacity_tokens", 0),
        samples,
        crowded,
        int(_number(f"{where}.beside", beside, "neighbours", 0)),
    )


def _samples(where: str, raw: Mapping[str, Any]) -> tuple[Sample, ...]:
    samples = tuple(
        _sample(f"{where}.{kind}[{i}]", entry)
        for kind in SAMPLE_KINDS
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
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not 0 <= value <= float_info.max:
        raise BadConfig(f"{where}.{key}", value, "must be a finite number of at least 0")
    return float(value)


def _positive(where: str, raw: Mapping[str, Any], key: str) -> float:
    value = _number(where, raw, key)
    if value == 0:
        raise BadConfig(f"{where}.{key}", value, "must be positive")
    return value


def _whole(where: str, raw: Mapping[str, Any], key: str, least: int) -> int:
    """One that is left out is the least."""
    value = raw.get(key, least)
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise BadConfig(f"{where}.{key}", value, f"must be a whole number of at least {least}")
    return value


def _text(where: str, value: object) -> str:
    if not isinstance(value, str):
        raise BadConfig(where, value, "must be text")
    return value
