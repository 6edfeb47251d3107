"""The controller's side of moving requests: what it asks for, of whom, and what it says."""

from dataclasses import replace

import pytest

from cluster.config import MigrationConfig
from cluster.control.balancing import Balancing
from engine.errors import InstanceLost
from engine.messages import InstanceState, Load, Migrate, Role, Running
from placement.view import InstanceView, View


class Controller:
    """What Balancing needs of the controller, with a record of what it did."""

    def __init__(self, *loads: Load, **options) -> None:
        self.loads = {one.instance: one for one in loads}
        self.now, self.sent, self.notes, self.dead = 0.0, [], [], set()
        config = MigrationConfig(**options)
        self.balancing = Balancing(config, self.view, self.send, self.note)

    def view(self) -> View:
        return View(self.now, tuple(InstanceView(load) for _, load in sorted(self.loads.items())))

    def send(self, to, message) -> None:
        if to in self.dead:
            raise InstanceLost(to)
        self.sent.append((to, message))

    def note(self, kind, subject, text, **fields) -> None:
        self.notes.append((kind, subject, text, fields["reason"]))


def load(name: str, count: int, blocks: int) -> Load:
    sequences = tuple(
        Running(f"{name}/{n}", 2, "running", 0, blocks * 16 - 4, 4, blocks) for n in range(count)
    )
    return Load(
        instance=name, role=Role.DECODE, state=InstanceState.READY, queue_requests=0,
        queued_tokens=0, running_sequences=count, running_tokens=count * blocks * 16,
        free_blocks=1000 - count * blocks, total_blocks=1000, block_tokens=16, pinned_blocks=0,
        cached_blocks=0, step_s=0.02, sequences=sequences,
    )  # fmt: skip


def skewed(**options) -> Controller:
    return Controller(load("decode-0", 9, 110), load("decode-1", 0, 0), **options)


def draining(**options) -> Controller:
    controller = Controller(load("decode-0", 2, 10), load("decode-1", 0, 0), **options)
    leaving = replace(controller.loads["decode-0"], state=InstanceState.DRAINING)
    controller.loads["decode-0"] = leaving
    return controller


def test_a_round_asks_the_source_to_move_and_says_so():
    controller = skewed()
    controller.balancing.look()
    ((to, message), *_) = controller.sent
    assert to == "decode-0"
    assert isinstance(message, Migrate)
    assert (message.target, message.reason) == ("decode-1", "balance")
    assert controller.notes[0] == ("migration", message.request_id, "asked", "balance")


def test_switched_off_it_still_empties_what_drains():
    off = skewed(enabled=False)
    off.balancing.look()
    assert off.sent == []
    emptying = draining(enabled=False)
    emptying.balancing.look()
    assert {message.reason for _, message in emptying.sent} == {"drain"}
    assert len(emptying.sent) == 2


def test_news_of_a_draining_instance_moves_nothing_else():
    controller = skewed()
    controller.balancing.empty()
    assert controller.sent == []


@pytest.mark.parametrize(("outcome", "asked"), [("OutOfBlocks", 4), ("committed", 2)])
def test_a_failed_move_is_asked_for_again_at_once(outcome, asked):
    controller = draining()
    controller.balancing.empty()
    for _, message in list(controller.sent):
        controller.balancing.ended(message.request_id, outcome)
    controller.balancing.empty()
    assert len(controller.sent) == asked


def test_a_source_that_is_gone_ends_nothing():
    controller = draining()
    controller.dead.add("decode-0")
    controller.balancing.empty()
    assert controller.sent == controller.notes == []
    controller.dead.clear()
    controller.balancing.empty()
    assert len(controller.sent) == 2


async def test_the_loop_runs_until_it_is_cancelled():
    import asyncio

    controller = skewed(interval_s=0.001)
    asked = asyncio.Event()
    controller.balancing._note = lambda *_, **__: asked.set()
    task = asyncio.create_task(controller.balancing.run())
    await asked.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
