"""The policy file that a gateway watches, and what it remembers for the next controller."""

import pytest

from cluster.control.policy_source import PolicySource, PolicyText
from engine.clock import VirtualClock
from engine.errors import BadConfig, DeadlineExceeded

POLICY = "budget_accelerators: 4\nroles:\n  decode: {max_replicas: 4}\n"
OTHER = POLICY.replace("max_replicas: 4", "max_replicas: 3")


class Controller:
    """Takes policies as the real one does, or not."""

    def __init__(self) -> None:
        self.applied: list[str] = []
        self.notes: list[tuple[str, str]] = []
        self.failure: Exception | None = None

    async def apply(self, policy: PolicyText) -> list[str]:
        if self.failure is not None:
            raise self.failure
        self.applied.append(policy.text)
        return ["changed"]

    def note(self, kind, subject, text, **fields):
        self.notes.append((subject, text))


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "policy.yaml"
    path.write_text(POLICY)
    return path


def watching(path, controller: Controller) -> PolicySource:
    return PolicySource(path, controller.apply, controller.note, VirtualClock(100.0))


async def test_the_file_at_the_start_is_what_a_controller_is_told(file):
    controller = Controller()
    source = watching(file, controller)
    assert source.latest == PolicyText(POLICY)
    await source.look(file)
    assert controller.applied == []


async def test_a_file_that_changes_is_put_in_force(file):
    controller = Controller()
    source = watching(file, controller)
    file.write_text(OTHER)
    await source.look(file)
    await source.look(file)
    assert controller.applied == [OTHER]
    assert source.latest == PolicyText(OTHER, 100.0)


async def test_a_file_that_turns_bad_changes_nothing_and_is_said_to_be_bad_once(file):
    controller = Controller()
    source = watching(file, controller)
    controller.failure = BadConfig("line 3: roles.decode", "4", "must be smaller")
    file.write_text(OTHER)
    await source.look(file)
    await source.look(file)
    assert controller.notes == [("policy.yaml", "refused, the running one stays")]
    assert source.latest == PolicyText(POLICY)


async def test_a_file_that_is_gone_is_told_once_and_read_again_when_it_is_back(file):
    controller = Controller()
    source = watching(file, controller)
    file.unlink()
    await source.look(file)
    await source.look(file)
    assert len(controller.notes) == 1
    file.write_text(OTHER)
    await source.look(file)
    assert controller.applied == [OTHER]


async def test_while_no_controller_answers_a_changed_file_is_tried_again(file):
    controller = Controller()
    source = watching(file, controller)
    controller.failure = DeadlineExceeded("no answer")
    file.write_text(OTHER)
    await source.look(file)
    assert controller.applied == []
    controller.failure = None
    await source.look(file)
    assert controller.applied == [OTHER]


async def test_what_is_applied_by_hand_is_remembered(file):
    controller = Controller()
    source = watching(file, controller)
    assert await source.apply(OTHER) == ["changed"]
    assert source.latest == PolicyText(OTHER, 100.0)
    await source.look(file)
    assert controller.applied == [OTHER], "the file has not changed"
