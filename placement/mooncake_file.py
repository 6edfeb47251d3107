"""Reads Mooncake's traces: JSON lines, with hashes of the 512-token blocks of every prompt."""

from __future__ import annotations

import json
from array import array
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from engine.errors import BadConfig
from placement.workload import MOST_TOKENS, PrefixTree, Workload

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

BLOCK_TOKENS = 512
MOST_MS = 1e15
HASHES = 1 << 64


def read_mooncake(path: Path) -> Workload:
    trace = _Trace()
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                trace.add(f"workload line {number}", line)
    if not trace.arrival_ms:
        raise BadConfig("workload", 0, "holds no requests")
    prompts = np.array(trace.prompts, dtype=np.int64)
    ids, tokens, tree = _shared_prefixes(trace)
    return Workload(
        np.array(trace.arrival_ms) / 1e3,
        prompts,
        np.array(trace.outputs, dtype=np.int64),
        prefix_id=ids,
        prefix_tokens=np.minimum(tokens, prompts),
        prefix_tree=tree,
    )


@dataclass(slots=True)
class _Trace:
    """What its lines say, in a few bytes a block."""

    arrival_ms: array[float] = field(default_factory=lambda: array("d"))
    prompts: array[int] = field(default_factory=lambda: array("q"))
    outputs: array[int] = field(default_factory=lambda: array("q"))
    hashes: array[int] = field(default_factory=lambda: array("Q"))
    """Of all requests, one after the other."""
    ends: array[int] = field(default_factory=lambda: array("q"))
    """Where each request's hashes end."""

    def add(self, where: str, line: str) -> None:
        entry = _parsed(where, line)
        arrival_ms = _number(where, entry, "timestamp", 0, MOST_MS)
        if self.arrival_ms and arrival_ms < self.arrival_ms[-1]:
            rule = f"must not be before the request above ({self.arrival_ms[-1]:g})"
            raise BadConfig(f"{where}, timestamp", arrival_ms, rule)
        self.arrival_ms.append(arrival_ms)
        self.prompts.append(_whole(where, entry, "input_length", 1))
        self.outputs.append(max(_whole(where, entry, "output_length", 0), 1))
        self.hashes.extend(_hashes(where, entry))
        self.ends.append(len(self.hashes))

    def chains(self) -> Iterator[list[int]]:
        start = 0
        for end in self.ends:
            yield self.hashes[start:end].tolist()
            start = end


def _parsed(where: str, line: str) -> Mapping[str, Any]:
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise BadConfig(where, line[:60], f"not JSON: {error}") from error
    if not isinstance(entry, dict):
        raise BadConfig(where, line[:60].strip(), "must be a JSON object")
    return entry


def _number(where: str, entry: Mapping[str, Any], name: str, least: int, most: float) -> float:
    value = entry.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:
        raise BadConfig(f"{where}, {name}", value, f"must be a number from {least} to {most:g}")
    return float(value)


def _whole(where: str, entry: Mapping[str, Any], name: str, least: int) -> int:
    value = _number(where, entry, name, least, MOST_TOKENS)
    if not value.is_integer():
        raise BadConfig(f"{where}, {name}", value, "must be a whole number")
    return int(value)


def _hashes(where: str, entry: Mapping[str, Any]) -> list[int]:
    hashes = entry.get("hash_ids", [])
    if not isinstance(hashes, list) or not all(type(one) is int for one in hashes):
        raise BadConfig(f"{where}, hash_ids", hashes, "must be a list of whole numbers")
    if hashes and not 0 <= min(hashes) <= max(hashes) < HASHES:
        raise BadConfig(f"{where}, hash_ids", hashes, "must be of 64 bits, and not negative")
    return hashes


def _shared_prefixes(
    trace: _Trace,
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any], PrefixTree]:
    """Per request the leading blocks that another request has too: the last one's place in a tree
    of all such blocks, and their tokens."""
    known, uses = np.unique(np.array(trace.hashes, dtype=np.uint64), return_counts=True)
    shared = set(known[uses > 1].tolist())
    numbers: dict[tuple[int, int], int] = {}
    ids, tokens = array("q"), array("q")
    for chain in trace.chains():
        prefix, depth = -1, 0
        for one in chain:
            if one not in shared:
                break
            prefix = numbers.setdefault((prefix, one), len(numbers))
            depth += 1
        ids.append(prefix)
        tokens.append(depth * BLOCK_TOKENS)
    parents = np.array([parent for parent, _ in numbers], dtype=np.int64)
    return np.array(ids), np.array(tokens), PrefixTree(parents, BLOCK_TOKENS)
