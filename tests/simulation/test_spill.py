"""A request that needs more KV than its instance has: it moves, is swapped out, is computed again
where there is room, or fails by name. It is never cut short in silence."""

from __future__ import annotations

import pytest

from decode.scheduler import DecodeSettings
from engine.errors import OutOfBlocks
from placement.balancing.balancer import Balancer
from placement.balancing.settings import BalancerSettings
from placement.routing.router import Route
from placement.view import InstanceView, View
from tests.simulation.scene import Scene

LOOK_S = 0.1


def growing(*names: str, large: int = 64, **options) -> Scene:
    """A request of 14 prompt tokens on decode-0, whose blocks hold 48 tokens."""
    blocks = {"decode-0": 12, **dict.fromkeys(names, large)}
    scene = Scene("decode-0", *names, blocks=blocks, **options)
    scene.ask("long", Route("decode-0"), tokens=90)
    return scene


def balance(scene: Scene) -> None:
    """The controller's loop, for as long as the request lives."""
    balancer = Balancer(BalancerSettings(low_steps=16, high_steps=32))

    def look() -> None:
        loads = [node.instance.load() for _, node in sorted(scene.nodes.items())]
        view = View(scene.now, tuple(InstanceView(load) for load in loads))
        for move in balancer.decide(view):
            scene.migrate(move.request_id, move.source, move.target)
        if "long" not in scene.finished:
            scene.happen(LOOK_S, look)

    scene.happen(LOOK_S, look)


def test_it_moves_with_its_kv_before_it_outgrows_its_instance():
    scene = growing("decode-1")
    balance(scene)
    scene.play()
    assert scene.finished["long"] == 90
    assert scene.outcomes == ["committed"]
    assert scene.seen["Start"] == 1


def test_without_a_balancer_it_is_computed_again_where_there_is_room():
    scene = growing("mixed-0").play()
    assert scene.finished["long"] == 90
    assert scene.seen["Dropped"] == 1
    assert scene.seen["Start"] >= 2


def test_where_no_pool_is_large_enough_it_fails_by_name():
    scene = growing("decode-1", large=12).play()
    error = scene.gateways["gateway-0"].failed["long"]
    assert error == OutOfBlocks.__name__


@pytest.mark.parametrize("host_slots", [0, 32])
def test_neighbours_that_grow_too_large_together_take_turns(host_slots):
    """Each fits alone: one is swapped to the host, or recomputed where there is no host memory."""
    decode = DecodeSettings(host_slots=host_slots, swap_block_s=1e-6)
    scene = Scene("mixed-0", blocks={"mixed-0": 12}, decode=decode)
    for name in "abc":
        scene.ask(name, Route("mixed-0"), prompt=8, tokens=30)
    scene.play()
    assert scene.finished == {"a": 30, "b": 30, "c": 30}
    assert scene.met["preemptions"] > 0
    assert scene.met["swaps"] > 0 if host_slots else scene.met["swaps"] == 0
