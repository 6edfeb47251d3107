"""An instance that drains stays for what is on its way to it."""

from cluster.instance.draining import Emptying, is_awaited
from placement.routing.router import Route
from tests.simulation.scene import Scene

SETTLE_S, LOOK_S = 0.05, 0.01


def drain(scene: Scene, name: str) -> None:
    """As the controller does it: looked at again and again, and ended once it may go."""
    scene.nodes[name].instance.drain()
    emptying = Emptying(SETTLE_S)

    def look() -> None:
        loads = {one: node.instance.load() for one, node in scene.nodes.items()}
        empty = emptying.is_over(loads[name], scene.now)
        if empty and not is_awaited(name, loads.values()):
            scene.end(name)
        else:
            scene.happen(LOOK_S, look)

    look()


def test_a_target_that_drains_takes_what_still_waits_for_its_prefill():
    scene = Scene("prefill-0", "decode-0", "decode-1")
    scene.ask("ahead", Route("prefill-0", "decode-1"), prompt=100, tokens=2, priority=1)
    behind = Route("prefill-0", "decode-0")
    scene.happen(0.05, lambda: scene.ask("behind", behind, tokens=4))
    scene.happen(0.12, lambda: drain(scene, "decode-0"))
    scene.play()
    assert scene.finished == {"ahead": 2, "behind": 4}
    assert scene.met["deaths"] == 1
    assert scene.seen["Start"] == 2, "nothing is prefilled twice"
