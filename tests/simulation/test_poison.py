"""A request that breaks what it runs on ends by itself, named; its neighbours go on."""

import pytest

from placement.routing.router import Route
from tests.simulation.scene import Scene

NEIGHBOURS = tuple(f"n{number}" for number in range(7))


def crowd(*instances: str, runs_ahead: bool = False) -> Scene:
    blocks = dict.fromkeys(instances, 128)
    scene = Scene(*instances, blocks=blocks, runs_ahead=runs_ahead)
    for number, name in enumerate(("bad", *NEIGHBOURS)):
        scene.ask(name, Route(instances[number % len(instances)]), tokens=24)
    return scene


def failed(scene: Scene) -> dict[str, str]:
    return scene.gateways["gateway-0"].failed


@pytest.mark.parametrize("instances", [("mixed-0",), ("mixed-0", "mixed-1")])
def test_a_poisoned_prompt_fails_alone_and_no_instance_dies(instances):
    scene = crowd(*instances)
    scene.poison("bad")
    scene.play()
    assert failed(scene) == {"bad": "PoisonRequest"}
    assert scene.finished == dict.fromkeys(NEIGHBOURS, 24)
    assert scene.met["deaths"] == 0


@pytest.mark.parametrize("runs_ahead", [False, True])
def test_a_request_that_turns_bad_while_it_decodes_fails_alone(runs_ahead):
    scene = crowd("mixed-0", runs_ahead=runs_ahead)
    scene.at_token("bad", 9, lambda: scene.poison("bad"))
    scene.play()
    assert failed(scene) == {"bad": "PoisonRequest"}
    assert len(scene.delivered_s["bad"]) >= 10
    assert scene.finished == dict.fromkeys(NEIGHBOURS, 24)
    assert bool(scene.met["ahead"]) == runs_ahead


def test_a_hand_off_is_given_back_when_its_prompt_fails():
    scene = Scene("prefill-0", "decode-0", "mixed-0")
    for name in ("bad", "good"):
        scene.ask(name, Route("prefill-0", "decode-0"), tokens=12)
    scene.poison("bad")
    scene.play()
    assert failed(scene) == {"bad": "PoisonRequest"}
    assert scene.finished == {"good": 12}


@pytest.mark.parametrize("at", [None, 5])
def test_a_lethal_request_takes_down_a_bounded_number_of_instances(at):
    scene = crowd("mixed-0", "mixed-1")
    if at is None:
        scene.make_lethal("bad")
    else:
        scene.at_token("bad", at, lambda: scene.make_lethal("bad"))
    scene.play()
    assert failed(scene) == {"bad": "PoisonRequest"}
    assert scene.finished == dict.fromkeys(NEIGHBOURS, 24)
    assert scene.met["deaths"] <= 3
