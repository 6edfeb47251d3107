"""Reads workloads: our CSV, Azure's, BurstGPT's and Mooncake's traces; each bad cell is named."""

from __future__ import annotations

import csv
import math
from contextlib import contextmanager
from datetime import datetime
from typing import TYPE_CHECKING, Any

import numpy as np

from engine.errors import BadConfig, check_names
from placement.mooncake_file import read_mooncake
from placement.workload import MOST_TOKENS, Workload

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

REQUIRED = ("arrival_s", "prompt_tokens", "output_tokens")
WHOLE = ("prompt_tokens", "output_tokens", "prefix_tokens", "priority")
LOWEST = {"prompt_tokens": 1, "output_tokens": 1, "prefix_tokens": 0}
OPTIONAL = ("prefix_id", "prefix_tokens", "priority", "slo_ttft_s", "slo_tpot_s")
AZURE = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
BURSTGPT = ("Timestamp", "Request tokens", "Response tokens")
UNIT = ("unit_arrival_s", "input_len", "output_len")
BEYOND = "beyond the columns"


def read_workload(path: Path) -> Workload:
    """The header tells the kind; JSON lines are Mooncake's."""
    with _readable(path):
        if path.suffix == ".jsonl":
            return read_mooncake(path)
        return _known(*_table(path))


def read_columns(path: Path, names: Sequence[str]) -> Workload:
    """A CSV that has arrivals, prompt and output tokens under these names."""
    with _readable(path):
        found, rows = _table(path)
    _check_columns(names, found)
    return _renamed(names, rows)


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    if not path.is_file():
        raise BadConfig("workload", str(path), "no such file")
    try:
        yield
    except UnicodeDecodeError as error:
        raise BadConfig("workload", str(path), f"not UTF-8: {error.reason}") from error
    except csv.Error as error:
        raise BadConfig("workload", str(path), f"not CSV: {error}") from error


def _table(path: Path) -> tuple[tuple[str, ...], list[dict[str, Any]]]:
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file, restkey=BEYOND)
        names, rows = tuple(reader.fieldnames or ()), list(reader)
    for number, row in enumerate(rows, 2):
        if any(more := row.get(BEYOND, ())):
            rule = f"stands beyond the {len(names)} columns"
            raise BadConfig(f"workload row {number}", ",".join(more), rule)
    return names, rows


def _known(names: Sequence[str], rows: list[dict[str, Any]]) -> Workload:
    if set(AZURE) <= set(names):
        return _read_azure(rows)
    if set(BURSTGPT) <= set(names):
        return _renamed(BURSTGPT, [row for row in rows if row["Response tokens"] != "0"])
    if set(UNIT) <= set(names):
        return _renamed(UNIT, rows)
    check_names("workload column", names, REQUIRED + OPTIONAL)
    return _columns(rows, names)


def _renamed(names: Sequence[str], rows: Sequence[Mapping[str, str | None]]) -> Workload:
    """Another format with the three columns that ours needs."""
    renamed = dict(zip(names, REQUIRED, strict=True))
    return _columns([{renamed[name]: row[name] for name in names} for row in rows], REQUIRED)


def _columns(rows: Sequence[Mapping[str, str | None]], names: Sequence[str]) -> Workload:
    _check_columns(REQUIRED, names)
    if not rows:
        raise BadConfig("workload", 0, "holds no requests")
    columns: dict[str, Any] = {}
    for name in names:
        if name == "prefix_id":
            columns[name] = _prefix_ids([row[name] or "" for row in rows])
        else:
            columns[name] = _numbers(name, [row[name] for row in rows])
    _check_arrivals(columns["arrival_s"])
    _check_prefixes(columns)
    return Workload(**columns)


def _check_columns(wanted: Sequence[str], found: Sequence[str]) -> None:
    missing = [name for name in wanted if name not in found]
    if missing:
        raise BadConfig("workload columns", ",".join(found), f"lacks {', '.join(missing)}")


def _numbers(name: str, cells: Sequence[str | None]) -> np.ndarray[Any, Any]:
    """A column; an empty cell of an optional one means the default."""
    whole, required = name in WHOLE, name in REQUIRED
    lowest = LOWEST.get(name)
    values = np.empty(len(cells))
    for index, cell in enumerate(cells):
        if not cell and not required:
            values[index] = 0.0 if whole else math.nan
            continue
        value = _number(name, index, cell)
        if lowest is not None and not lowest <= value <= MOST_TOKENS:
            raise _bad_cell(name, index, cell, f"must be from {lowest} to {MOST_TOKENS}")
        if name.startswith("slo_") and value <= 0:
            raise _bad_cell(name, index, cell, "must be positive")
        if whole and value != int(value):
            raise _bad_cell(name, index, cell, "must be a whole number")
        values[index] = value
    return values.astype(np.int64) if whole else values


def _number(name: str, index: int, cell: str | None) -> float:
    try:
        value = float(cell or "")
    except ValueError as error:
        raise _bad_cell(name, index, cell, "must be a number") from error
    if not math.isfinite(value):
        raise _bad_cell(name, index, cell, "must be finite")
    return value


def _bad_cell(name: str, index: int, cell: object, rule: str) -> BadConfig:
    """Rows are counted as in the file: its first data row is row 2."""
    return BadConfig(f"workload row {index + 2}, {name}", cell, rule)


def _check_arrivals(arrival_s: np.ndarray[Any, Any]) -> None:
    negative = np.flatnonzero(arrival_s < 0)
    if len(negative):
        row = int(negative[0])
        raise _bad_cell("arrival_s", row, float(arrival_s[row]), "must not be negative")
    backwards = np.flatnonzero(np.diff(arrival_s) < 0)
    if len(backwards):
        row = int(backwards[0]) + 1
        rule = f"must not be before the row above ({arrival_s[row - 1]:g})"
        raise _bad_cell("arrival_s", row, float(arrival_s[row]), rule)


def _check_prefixes(columns: dict[str, Any]) -> None:
    if ("prefix_id" in columns) != ("prefix_tokens" in columns):
        given = "prefix_id" if "prefix_id" in columns else "prefix_tokens"
        raise BadConfig("workload columns", given, "prefix_id and prefix_tokens go together")
    if "prefix_tokens" not in columns:
        return
    longer = np.flatnonzero(columns["prefix_tokens"] > columns["prompt_tokens"])
    if len(longer):
        row = int(longer[0])
        cell = int(columns["prefix_tokens"][row])
        raise _bad_cell("prefix_tokens", row, cell, "must not exceed prompt_tokens")


def _prefix_ids(cells: Sequence[str]) -> np.ndarray[Any, Any]:
    """Names numbered in order of appearance; no name, no shared prefix."""
    numbers: dict[str, int] = {"": -1}
    for cell in cells:
        numbers.setdefault(cell, len(numbers) - 1)
    return np.array([numbers[cell] for cell in cells], dtype=np.int64)


def _read_azure(rows: Sequence[dict[str, str]]) -> Workload:
    """One hour of production: timestamps to 100 ns, in file order by time."""
    if not rows:
        raise BadConfig("workload", 0, "holds no requests")
    moments = [_azure_moment(index, row["TIMESTAMP"]) for index, row in enumerate(rows)]
    start = moments[0]
    renamed = [
        {
            "arrival_s": repr(moment - start),
            "prompt_tokens": row["ContextTokens"],
            "output_tokens": row["GeneratedTokens"],
        }
        for moment, row in zip(moments, rows, strict=True)
    ]
    return _columns(renamed, REQUIRED)


def _azure_moment(index: int, cell: str) -> float:
    seconds, _, fraction = cell.partition(".")
    try:
        whole = datetime.fromisoformat(f"{seconds}+00:00").timestamp()
        return whole + (float(f"0.{fraction}") if fraction else 0.0)
    except ValueError as error:
        raise _bad_cell("TIMESTAMP", index, cell, "must be a date and time") from error
