"""`tandem top`: the live page's document as text."""

from __future__ import annotations

import asyncio
import io
import json
from typing import TYPE_CHECKING, Any

import pytest
from rich.console import Console

from cluster.cli.app import run
from cluster.cli.top import BAR_CELLS, Picture, sparks, stacked, timeline
from cluster.doors.grpc_door import GrpcDoor
from cluster.gateway.call import Call
from tests.cluster.seats import PREDICTED, Seat, watched_by_all
from tests.cluster.serving import ask, running, settle, until
from tests.cluster.test_grpc import FakeOperator
from tests.cluster.watching import migrated

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

FACTS = (
    "running", "waiting", "ended", "requests/s", "tokens/s", "within targets", "failed",
    "migrations", "failovers",
)  # fmt: skip
PARTS = ("queue", "prefill", "transfer", "decode queue", "first step")


def drawn(seen: dict[str, Any], width: int = 200, height: int = 60) -> str:
    out = io.StringIO()
    Console(file=out, width=width, height=height).print(Picture(seen))
    return out.getvalue()


@pytest.fixture
async def seats() -> AsyncIterator[list[Seat]]:
    async with watched_by_all("prefill-0", "decode-0") as found:
        yield found


async def test_every_fact_of_the_live_page_is_there(seats: list[Seat]) -> None:
    for seat in seats:
        await ask(seat.gateway, Call(prompts=("hello",), max_tokens=4))
    seen = await seats[0].whole.document()
    text = drawn(seen)
    assert "Tandem demo" in text
    assert "gateways 2" in text
    assert [fact for fact in FACTS if fact not in text] == []
    assert [part for part in PARTS if part not in text] == []
    assert len(seen["instances"]) == len(seen["ended"]) == 2
    assert all(one["id"] in text for one in (*seen["instances"], *seen["ended"]))
    assert all(f"{point}" in text for point in ("p50", "p90", "p99"))
    assert "predicted" in text
    assert f"{PREDICTED['attainment']:.1%}" in text


async def test_moves_and_silent_gateways_are_told(seats: list[Seat]) -> None:
    first, second = seats
    answer = await first.gateway.open(Call(prompts=("hello",), max_tokens=1900))
    await until(lambda: answer.output_tokens > 3)
    first.gateway.receive("decode-0", migrated(answer.id))
    first.cluster.network.kill(second.gateway.link.name)
    text = drawn(await first.whole.document())
    assert "gateway-1 without an answer" in text
    assert "migration" in text
    assert f"{answer.id}" in text
    assert "paused 4 ms" in text
    first.gateway.close(answer)


class Describes(FakeOperator):
    """Of a real gateway what its live page shows."""

    def __init__(self, seat: Seat) -> None:
        super().__init__()
        self._seat = seat

    async def describe(self) -> tuple[dict[str, Any], dict[str, Any]]:
        return await self._seat.whole.document(), {}


async def test_the_command_asks_a_running_cluster(
    seats: list[Seat], capsys: pytest.CaptureFixture[str]
) -> None:
    door = GrpcDoor(seats[0].gateway, Describes(seats[0]), port=0)
    await door.start()
    server = ("--server", f"127.0.0.1:{door.port}")
    assert await asyncio.to_thread(run, ["top", "--json", *server]) == 0
    assert len(json.loads(capsys.readouterr().out)["instances"]) == 2
    assert await asyncio.to_thread(run, ["top", "--once", *server]) == 0
    assert "prefill-0" in capsys.readouterr().out
    await door.stop(0.0)


async def test_before_anything_happened_it_shows_what_there_is() -> None:
    async with running("mixed-0") as cluster:
        seat = Seat.at(cluster, cluster.gateway, 0.0)
        cluster.tell_loads()
        await settle()
        assert "mixed-0" in drawn(await seat.whole.document())


async def test_a_narrow_terminal_cuts_no_figure(seats: list[Seat]) -> None:
    await ask(seats[0].gateway, Call(prompts=("hello",), max_tokens=4, request_id="short"))
    seen = await seats[0].whole.document()
    lines = drawn(seen, width=80, height=24).splitlines()
    (row,) = (line for line in lines if line.strip().startswith("short"))
    assert "length" in row
    assert "5 + 4" in row
    (row,) = (line for line in lines if line.strip().startswith("decode-0"))
    blocks = next(one["blocks"] for one in seen["instances"] if one["id"] == "decode-0")
    assert f"% of {blocks['total']}" in row


def test_a_bars_pieces_fill_it_whole() -> None:
    bar = stacked([("blue", "a", 1.0), ("red", "b", 3.0)], 4.0)
    assert bar.plain == "a" * (BAR_CELLS // 4) + "b" * (3 * BAR_CELLS // 4)
    assert stacked([], 0.0).plain == "░" * BAR_CELLS
    assert timeline([{"name": "queue", "start_s": 0.0, "end_s": 0.5}]).plain == "█" * BAR_CELLS


def test_sparks_keep_peaks_and_gaps() -> None:
    assert sparks([0.0, None, 2.0]) == "▁ █"
    assert len(sparks([1.0] * 150)) <= 40
    assert "█" in sparks([0.1] * 100 + [9.0] + [0.1] * 40)
