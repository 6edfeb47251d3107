"""An instance by itself: what it answers to messages that find things otherwise than expected."""

from cluster.instance.instance import Instance, InstanceSettings
from engine.blocks import BlockPool
from engine.layout import KvLayout
from engine.messages import Abort, Dropped, Role, Start
from engine.request import Request, Sampling

LAYOUT = KvLayout("m", 2, 1, 8, 4, "float32")
REQUEST = Request("r", (1, 2, 3, 4, 5), Sampling(max_tokens=6))


def instance(role: Role = Role.MIXED) -> Instance:
    name = f"{role.value}-0"
    settings = InstanceSettings()
    return Instance(name, role, BlockPool(32, 4), LAYOUT, settings=settings, eos=frozenset())


def said(one: Instance) -> list[tuple[str, object]]:
    return [(envelope.to, envelope.message) for envelope in one.take_outbox()]


def test_a_start_under_an_aborted_epoch_is_refused_aloud_and_a_later_one_is_taken():
    one = instance()
    one.receive("gateway-0", Abort("r", 2), 0.0)
    one.receive("gateway-1", Start(REQUEST, 2), 0.0)
    ((to, dropped),) = said(one)
    assert isinstance(dropped, Dropped)
    assert (to, dropped.epoch, dropped.error) == ("gateway-1", 2, "StaleEpoch")
    assert not one.load().sequences
    one.receive("gateway-1", Start(REQUEST, 3), 0.0)
    assert said(one) == []
    assert [running.epoch for running in one.load().sequences] == [3]
