"""A link that alters what it carries, where checksums are compared: no reader ever notices."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from engine.messages import Dropped
from placement.routing.router import Route
from tests.simulation.scene import Scene

if TYPE_CHECKING:
    from cluster.instance.instance import InstanceSettings


class AlteredScene(Scene):
    """Copies are altered while the script says so."""

    altering = True

    def _drawn_settings(self) -> InstanceSettings:
        settings = super()._drawn_settings()
        return replace(settings, transfer=replace(settings.transfer, checksums=True))

    def _corrupt(self, node, order) -> None:
        if self.altering:
            node.model.corrupt(order.target_blocks[-1], order.first_layer)


def test_an_altered_hand_off_is_replayed():
    scene = AlteredScene("prefill-0", "decode-0")
    scene.ask("a", Route("prefill-0", "decode-0"), tokens=12)
    scene.before(Dropped, lambda: setattr(scene, "altering", False))
    scene.play()
    assert scene.met["mismatches"] == 1
    assert scene.seen["Dropped"] == 1
    assert scene.seen["Start"] == 2
    assert scene.finished == {"a": 12}


def test_an_altered_migration_ends_by_name_and_its_source_goes_on():
    scene = AlteredScene("decode-0", "decode-1")
    scene.ask("a", Route("decode-0"), tokens=20)
    scene.at_token("a", 4, lambda: scene.migrate("a", "decode-0", "decode-1"))
    scene.play()
    assert scene.outcomes == ["ChecksumMismatch"]
    assert scene.seen["Start"] == 1
    assert scene.finished == {"a": 20}
    scene.altering = False
    scene.ask("later", Route("decode-0"), tokens=20)
    scene.at_token("later", 4, lambda: scene.migrate("later", "decode-0", "decode-1"))
    scene.play()
    assert scene.outcomes == ["ChecksumMismatch", "committed"]
    assert scene.finished["later"] == 20
