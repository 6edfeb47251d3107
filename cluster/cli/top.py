"""`tandem top`: what the live page shows, as text."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.table import Table
from rich.text import Text

from engine.events import TTFT_PARTS

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from rich.console import Console, ConsoleOptions, RenderResult

Seen = dict[str, Any]
SPARKS = "▁▂▃▄▅▆▇█"
SPARK_STEPS = 40
RATE_STEPS = 5
BAR_CELLS = 16
COLOURS = {
    "queue": "bright_black",
    "prefill": "blue",
    "transfer": "magenta",
    "decode_queue": "yellow",
    "first_step": "green",
    "decode": "white",
}
OPEN_COLOUR = "cyan"
BLOCKS = {"used": ("blue", "█"), "pinned": ("magenta", "▓"), "cached": ("cyan", "▒")}
MOVES = {"handoff": "hand-off", "migration": "migration", "failover": "failover"}
QUANTILES = ("p50", "p90", "p99")
FIXED_LINES = 32
"""What everything but the lists of requests and moves takes."""
WIDE, WIDEST = 125, 170
"""Where the courses and the lists have room beside each other."""


class Picture:
    """Fits the terminal: a smaller one shows fewer requests and moves."""

    def __init__(self, seen: Seen) -> None:
        self._seen = seen

    def __rich_console__(self, _: Console, options: ConsoleOptions) -> RenderResult:
        seen, width = self._seen, options.max_width
        height = options.height or options.size.height
        left = max(height - FIXED_LINES - len(seen["instances"]), 9)
        rows = left // 3
        yield heading(seen)
        yield instances(seen)
        yield _beside(width >= WIDE, courses(seen), Group(comparison(seen), parts(seen)))
        requests = Group(under_way(seen, rows), ended(seen, rows))
        yield _beside(width >= WIDEST, requests, moves(seen, rows))


def _beside(wide: bool, left: Any, right: Any) -> Any:
    if not wide:
        return Group(left, right)
    grid = Table.grid(padding=(0, 3))
    grid.add_row(left, right)
    return grid


def heading(seen: Seen) -> Text:
    """The model, the gateways and the figures that matter most."""
    text = Text().append(f"Tandem {seen['model']}   ", "bold")
    silent = [one["id"] for one in seen["gateways"] if not one["answers"]]
    text.append(f"gateways {len(seen['gateways'])}", "dim")
    if silent:
        text.append(f", {', '.join(silent)} without an answer", "bold red")
    text.append("\n")
    for name, value, bad in _facts(seen):
        text.append(f"{name} ", "dim").append(value, "bold red" if bad else "bold").append("   ")
    return text


def _facts(seen: Seen) -> list[tuple[str, str, bool]]:
    totals, share = seen["totals"], seen["observed"]["attainment"]
    recent = seen["history"][-RATE_STEPS:]
    rate, tokens = (
        sum(point[name] for point in recent) / max(len(recent), 1)
        for name in ("rate_rps", "tokens_s")
    )
    return [
        ("running", str(totals["running"]), False),
        ("waiting", str(totals["waiting"]), False),
        ("ended", str(totals["requests"]), False),
        ("requests/s", f"{rate:.1f}", False),
        ("tokens/s", f"{tokens:.0f}", False),
        ("within targets", percent(share), share is not None and share < _goal(seen)),
        ("failed", str(totals["failed"]), totals["failed"] > 0),
        ("migrations", str(totals["migrations"]), False),
        ("failovers", str(totals["failovers"]), False),
    ]


def _goal(seen: Seen) -> float:
    return float(seen["slo"]["attainment"])


def instances(seen: Seen) -> Table:
    """The pools, prefill first."""
    table = _table("instance", "role", "state", "queue", "batch", "step", "KV")
    roles = ("prefill", "decode", "mixed")
    for one in sorted(seen["instances"], key=lambda one: (roles.index(one["role"]), one["id"])):
        table.add_row(
            one["id"],
            one["role"],
            one["state"],
            str(one["queue_requests"]),
            str(one["running_sequences"]),
            duration(one["step_s"] or None),
            _blocks(one["blocks"]),
        )
    return table


def _blocks(blocks: dict[str, int]) -> Text:
    whole = max(blocks["total"], 1)
    bar = stacked([(*look, blocks[kind]) for kind, look in BLOCKS.items()], whole)
    return bar.append(f" {100 * blocks['used'] / whole:.0f}% of {blocks['total']}")


def courses(seen: Seen) -> Table:
    """Latencies, attainment and throughput over the last minutes, as sparks."""
    slo, points = seen["slo"], seen["history"]
    table = _table("the last five minutes", "", "latest", "target")
    rows: list[tuple[str, Callable[[Any], float | None], Callable[[Any], str], Any]] = [
        ("first token, p50", lambda p: p["ttft_s"]["p50"], duration, slo["ttft_s"]),
        ("first token, p99", lambda p: p["ttft_s"]["p99"], duration, slo["ttft_s"]),
        ("per token, p50", lambda p: p["tpot_s"]["p50"], duration, slo["tpot_s"]),
        ("per token, p99", lambda p: p["tpot_s"]["p99"], duration, slo["tpot_s"]),
        ("within targets", lambda p: p["attainment"], percent, slo["attainment"]),
        ("tokens/s", lambda p: p["tokens_s"], figure, None),
    ]
    for title, read, unit, goal in rows:
        values = [read(point) for point in points]
        latest = next((value for value in reversed(values) if value is not None), None)
        table.add_row(title, sparks(values), unit(latest), "" if goal is None else unit(goal))
    return table


def comparison(seen: Seen) -> Table:
    """The plan's prediction beside what is observed."""
    predicted, observed = seen["predicted"] or {}, seen["observed"]
    table = _table("plan and reality", *(["predicted"] if predicted else []), "observed")
    latencies = [("first token", "ttft_s"), ("per token", "tpot_s")]
    rows: list[tuple[str, Sequence[str], Callable[[float | None], str]]] = [
        *((f"{name}, {q}", (key, q), duration) for name, key in latencies for q in QUANTILES),
        ("within targets", ("attainment",), percent),
        ("requests/s", ("rate_rps",), figure),
        ("tokens/s", ("throughput_tokens_s",), figure),
    ]
    for title, path, unit in rows:
        sides = [predicted, observed] if predicted else [observed]
        table.add_row(title, *(unit(_at(side, path)) for side in sides))
    return table


def _at(document: Any, path: Sequence[str]) -> float | None:
    """None where a plan does not say."""
    for name in path:
        document = (document or {}).get(name)
    return None if document is None else float(document)


def parts(seen: Seen) -> Text:
    """Where the time to a flowing stream goes, on the average."""
    means = {part: seen["observed"]["ttft_parts_s"][part] or 0.0 for part in TTFT_PARTS}
    pieces = [(COLOURS[part], "█", took_s) for part, took_s in means.items()]
    bar = stacked(pieces, sum(means.values()))
    text = Text().append("time to a flowing stream  ", "bold").append_text(bar).append("\n")
    for part, took_s in means.items():
        text.append("■ ", COLOURS[part]).append(f"{part.replace('_', ' ')} {duration(took_s)}  ")
    return text


def under_way(seen: Seen, rows: int) -> Table:
    title = "request under way"
    table = _table(title, "at", "tokens", "for", "so far", folds=title)
    for one in seen["requests"][:rows]:
        age_s = max(seen["now_s"] - one["arrived_s"], 0.0)
        table.add_row(
            one["id"], one["at"] or "waiting", tokens(one), duration(age_s), timeline(one["phases"])
        )
    return table


def ended(seen: Seen, rows: int) -> Table:
    title = "request ended"
    table = _table(title, "first token", "per token", "tokens", "outcome", "timeline", folds=title)
    for one in seen["ended"][:rows]:
        outcome = Text(one["error"] or one["outcome"], "green" if one["met"] else "red")
        latencies = duration(one["ttft_s"]), duration(one["tpot_s"])
        table.add_row(one["id"], *latencies, tokens(one), outcome, timeline(one["phases"]))
    return table


def moves(seen: Seen, rows: int) -> Table:
    """The latest first."""
    table = _table("move", "request", "from", "to", "", folds="request")
    for one in seen["moves"][: -rows - 1 : -1]:
        paused = f"paused {duration(one['pause_s'])}" if "pause_s" in one else ""
        told = paused if one["outcome"] == "committed" else one["outcome"]
        table.add_row(MOVES[one["kind"]], one["request"], one["source"], one["target"], told)
    return table


def tokens(one: dict[str, Any]) -> str:
    return f"{one['prompt_tokens']} + {one['output_tokens']}"


def timeline(phases: Sequence[dict[str, Any]]) -> Text:
    """A request's phases, each as long as it took."""
    pieces = [
        (COLOURS.get(phase["name"], OPEN_COLOUR), "█", phase["end_s"] - phase["start_s"])
        for phase in phases
    ]
    return stacked(pieces, sum(took_s for *_, took_s in pieces))


def stacked(pieces: Sequence[tuple[str, str, float]], whole: float, cells: int = BAR_CELLS) -> Text:
    """Pieces of a whole side by side, each in its colour and letter; what is left is pale."""
    bar, begun, done = Text(), 0.0, 0
    for colour, letter, value in pieces:
        begun += value
        end = round(cells * min(begun / whole, 1.0)) if whole > 0 else 0
        bar.append(letter * (end - done), colour)
        done = end
    return bar.append("░" * (cells - done), "bright_black")


def sparks(values: Sequence[float | None]) -> str:
    """The highest of each stretch of time; a gap where nothing was measured."""
    stretch = max(-(-len(values) // SPARK_STEPS), 1)
    heights = []
    for start in range(0, len(values), stretch):
        known = [value for value in values[start : start + stretch] if value is not None]
        heights.append(max(known, default=None))
    top = max((height for height in heights if height), default=1.0) / (len(SPARKS) - 1)
    return "".join(" " if h is None else SPARKS[round(h / top)] for h in heights)


def duration(value_s: float | None) -> str:
    if value_s is None:
        return "-"
    if value_s < 1.0:
        return f"{value_s * 1e3:.3g} ms"
    return f"{value_s:.2f} s"


def percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f}%"


def figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def _table(*columns: str, folds: str = "") -> Table:
    """Nothing cut: names are typed into other commands; one column folds where there is no room."""
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for column in columns:
        table.add_column(column, no_wrap=column != folds, overflow="fold")
    return table
