"""The failure table of hand-offs and migrations, row by row, and then at every single moment.

Each scene ends with every request answered in full, in order and without repeats, with every pool
back at its baseline, and with one more migration over the same instances that succeeds.
"""

from functools import partial

import pytest

from decode.scheduler import DecodeSettings
from engine.blocks import blocks_for
from engine.messages import (
    Accepted,
    Cancelled,
    Claim,
    Confirmed,
    Kept,
    Offer,
    Pulled,
    Ready,
    Reserved,
    Sealed,
    Verdict,
)
from kvtransfer.transfer import TransferSettings
from placement.routing.router import Route
from tests.simulation.scene import DETECTED_S, STEP_S, Scene

LEASE_S = TransferSettings().lease_s
BEFORE_COMMIT = [Offer, Reserved, Ready, Pulled, Sealed]


def handing_off(**options) -> Scene:
    """One request from prefill-0 to decode-0, with another instance to fall back on; the link is
    slow enough for the first token to be drawn while KV still moves."""
    scene = Scene("prefill-0", "decode-0", "mixed-0", **options)
    scene.pull_block_s = 0.01
    scene.ask("a", Route("prefill-0", "decode-0"), tokens=12)
    return scene


def migrating(**options) -> Scene:
    """One request from decode-0 to decode-1 at its fifth token, a neighbour on either side."""
    scene = Scene("decode-0", "decode-1", **options)
    scene.ask("a", Route("decode-0"), tokens=20)
    scene.ask("near", Route("decode-0"), tokens=12)
    scene.ask("far", Route("decode-1"), tokens=12)
    scene.at_token("a", 4, lambda: scene.migrate("a", "decode-0", "decode-1"))
    return scene


SCENES = {
    "hand-off": handing_off,
    "migration": migrating,
    "migration, steps ahead": partial(migrating, runs_ahead=True),
}
SOURCE = {kind: "prefill-0" if kind == "hand-off" else "decode-0" for kind in SCENES}
TARGET = {kind: "decode-0" if kind == "hand-off" else "decode-1" for kind in SCENES}


def check_migration_works(scene: Scene, source: str, target: str) -> None:
    """After all that, a fresh request moves over the same two instances."""
    scene.pull_block_s = 0.001
    scene.ask("later", Route(source), tokens=20)
    scene.at_token("later", 4, lambda: scene.migrate("later", source, target))
    scene.play()
    assert [one.outcome for one in scene.ended if one.request_id == "later"] == ["committed"]
    assert scene.finished["later"] == 20


def play_and_check(scene: Scene, kind: str) -> Scene:
    scene.play()
    assert not scene.gateways["gateway-0"].failed
    check_migration_works(scene, SOURCE[kind], TARGET[kind])
    return scene


def replays(scene: Scene) -> int:
    return scene.seen["Start"] - len(scene.delivered_s)


# Source dies before commit.


@pytest.mark.parametrize("moment", BEFORE_COMMIT)
@pytest.mark.parametrize("kind", SCENES)
def test_a_source_that_dies_before_commit_is_replayed_elsewhere(kind, moment):
    scene = SCENES[kind]()
    scene.before(moment, lambda: scene.end(SOURCE[kind]))
    scene.play()
    assert scene.finished["a"] == (12 if kind == "hand-off" else 20)
    assert replays(scene) >= 1
    check_migration_works(scene, SOURCE[kind], TARGET[kind])


@pytest.mark.parametrize("moment", BEFORE_COMMIT)
def test_a_second_after_a_prefills_death_was_noticed_its_request_goes_on_and_nothing_is_reserved(
    moment,
):
    scene = handing_off()
    target, died_s = scene.nodes["decode-0"].instance, []

    def check() -> None:
        assert target.pool.counts().reserved == 0
        assert len(target._transfers._arrivals) == 0
        assert scene.delivered_s["a"][-1] > died_s[0]

    def die() -> None:
        died_s.append(scene.now)
        scene.end("prefill-0")
        scene.happen(DETECTED_S + 1.0, check)

    scene.before(moment, die)
    play_and_check(scene, "hand-off")


@pytest.mark.parametrize("moment", [Ready, Sealed])
@pytest.mark.parametrize("kind", SCENES)
def test_the_targets_lease_frees_everything_when_nobody_notices_the_death(kind, moment):
    scene = SCENES[kind]()
    target = scene.nodes[TARGET[kind]].instance

    def nothing_is_reserved() -> None:
        assert target.pool.counts().reserved == 0
        assert len(target._transfers._arrivals) == 0

    def die() -> None:
        scene.end(SOURCE[kind], detected_s=LEASE_S + 1.0)
        scene.happen(LEASE_S + 0.2, nothing_is_reserved)

    scene.before(moment, die)
    play_and_check(scene, kind)


# Target dies before commit.


@pytest.mark.parametrize("moment", BEFORE_COMMIT)
def test_a_hand_offs_target_that_dies_before_commit_is_replaced(moment):
    scene = handing_off()
    scene.before(moment, lambda: scene.end("decode-0"))
    play_and_check(scene, "hand-off")
    assert scene.finished["a"] == 12


@pytest.mark.parametrize("moment", [*BEFORE_COMMIT, Claim, Verdict])
def test_a_migrations_target_that_dies_before_commit_leaves_the_source_to_go_on(moment):
    scene = migrating()
    scene.before(moment, lambda: scene.end("decode-1"))
    scene.play()
    assert scene.finished["a"] == 20
    assert scene.longest_gap_s("a") < DETECTED_S + 0.2
    assert "committed" not in scene.outcomes
    starts_of_the_neighbour = 2
    assert scene.seen["Start"] == 2 + starts_of_the_neighbour
    check_migration_works(scene, "decode-0", "decode-1")


# Target dies after commit, before its first token.


@pytest.mark.parametrize("delay_s", [0.0, STEP_S / 2])
def test_the_gateway_swaps_back_to_the_source_when_the_target_dies_after_commit(delay_s):
    scene = migrating()
    scene.before(Confirmed, lambda: scene.happen(delay_s, lambda: scene.end("decode-1")))
    scene.play()
    assert scene.seen["Resume"] == 1
    assert scene.finished["a"] == 20
    assert scene.longest_gap_s("a") < DETECTED_S + 0.2
    check_migration_works(scene, "decode-0", "decode-1")


# Commit reply lost.


def test_a_source_whose_verdict_is_lost_asks_again_and_never_resumes_blindly():
    scene = migrating()
    scene.lose(Verdict, 2)
    scene.play()
    assert scene.seen["Claim"] == 3
    assert scene.seen["Resume"] == 0
    assert scene.outcomes == ["committed"]
    check_migration_works(scene, "decode-0", "decode-1")


@pytest.mark.parametrize("kind", SCENES)
def test_a_target_whose_confirmation_is_lost_asks_for_it_again(kind):
    scene = SCENES[kind]()
    scene.lose(Confirmed, 2)
    scene.play()
    assert scene.seen["Confirmed"] == 1
    assert replays(scene) == 0
    check_migration_works(scene, SOURCE[kind], TARGET[kind])


def test_a_lost_acceptance_is_made_up_for_by_the_next_load():
    scene = migrating()
    scene.lose(Accepted)
    scene.play()
    assert replays(scene) == 0
    check_migration_works(scene, "decode-0", "decode-1")


# Client cancels.


@pytest.mark.parametrize("moment", [*BEFORE_COMMIT, Confirmed])
@pytest.mark.parametrize("kind", SCENES)
def test_a_cancelled_request_leaves_nothing_on_either_side_within_a_second(kind, moment):
    scene = SCENES[kind]()

    def nothing_is_held() -> None:
        for name in (SOURCE[kind], TARGET[kind]):
            listed = [one.request_id for one in scene.nodes[name].instance.load().sequences]
            assert "a" not in listed

    def cancel() -> None:
        scene.cancel("a")
        scene.happen(1.0, nothing_is_held)

    scene.before(moment, cancel)
    play_and_check(scene, kind)
    assert "a" not in scene.finished


# Target runs out of blocks.


def test_a_target_too_small_for_the_request_refuses_at_the_offer():
    scene = migrating(blocks={"decode-1": 4})
    scene.play()
    assert scene.outcomes == ["OutOfBlocks"]
    assert scene.finished["a"] == 20
    assert scene.longest_gap_s("a") < 3 * STEP_S


def test_a_target_that_runs_short_while_copying_releases_everything():
    """The sequence outgrows its reservation during a slow round, and others took the rest."""
    scene = migrating(blocks={"decode-1": 24})
    scene.pull_block_s = 0.05
    others = []
    target = scene.nodes["decode-1"].instance.pool

    def take_the_rest() -> None:
        if not scene.ended:
            others.extend(target.allocate(target.available))

    for number in range(1, 5):
        scene.before(Ready, take_the_rest, number)
    scene.before(Cancelled, lambda: target.release(others))
    scene.play()
    assert scene.outcomes == ["OutOfBlocks"]
    assert scene.finished["a"] == 20
    check_migration_works(scene, "decode-0", "decode-1")


def test_a_hand_off_to_a_full_target_waits_and_then_decodes_where_it_is():
    scene = handing_off()
    pool = scene.nodes["decode-0"].instance.pool
    others = pool.allocate(pool.available)
    scene.before(Kept, lambda: pool.release(others))
    play_and_check(scene, "hand-off")
    assert scene.finished["a"] == 12
    assert replays(scene) == 0


def test_an_offer_that_waits_for_room_wants_its_blocks():
    scene = handing_off()
    target = scene.nodes["decode-0"].instance
    others = target.pool.allocate(target.pool.available)
    wanted = []
    scene.happen(1.0, lambda: wanted.append(target.load().wanted_blocks))
    scene.before(Kept, lambda: target.pool.release(others))
    play_and_check(scene, "hand-off")
    assert wanted == [blocks_for(len(scene.asked["a"].prompt) + 1, target.pool.block_tokens)]
    assert target.load().wanted_blocks == 0


def test_a_request_that_was_kept_can_still_move_to_the_target_that_was_full():
    scene = handing_off()
    pool = scene.nodes["decode-0"].instance.pool
    others = pool.allocate(pool.available)

    def make_room() -> None:
        pool.release(others)
        scene.happen(2 * STEP_S, lambda: scene.migrate("a", "prefill-0", "decode-0"))

    scene.before(Kept, make_room)
    scene.play()
    assert scene.outcomes == ["committed"]
    assert scene.finished["a"] == 12
    assert replays(scene) == 0


# The request ends or is preempted mid-way.


@pytest.mark.parametrize("tokens", range(6, 12))
def test_a_request_that_ends_while_it_moves_is_answered_once(tokens):
    scene = Scene("decode-0", "decode-1")
    scene.pull_block_s = 0.02
    scene.ask("a", Route("decode-0"), tokens=tokens)
    scene.at_token("a", 4, lambda: scene.migrate("a", "decode-0", "decode-1"))
    play_and_check(scene, "migration")
    assert scene.finished["a"] == tokens


@pytest.mark.parametrize("host_slots", [0, 32])
def test_a_sequence_preempted_while_it_moves_stays_and_frees_the_target(host_slots):
    settings = DecodeSettings(host_slots=host_slots, swap_block_s=1e-6)
    scene = Scene("decode-0", "decode-1", blocks={"decode-0": 16}, decode=settings)
    scene.pull_block_s = 0.05
    scene.ask("a", Route("decode-0"), tokens=30)
    scene.ask("urgent", Route("decode-0"), tokens=44, priority=1)
    scene.at_token("a", 8, lambda: scene.migrate("a", "decode-0", "decode-1"))
    play_and_check(scene, "migration")
    assert scene.outcomes[0] == "OutOfBlocks"
    assert scene.finished == {"a": 30, "urgent": 44, "later": 20}


# One TP rank fails.


@pytest.mark.parametrize("kind", SCENES)
def test_a_rank_that_fails_its_part_of_a_pull_ends_the_transfer_without_a_commit(kind):
    """An instance reports a pull as failed if any of its ranks did not get all of its bytes."""
    scene = SCENES[kind]()
    scene.fail_pulls(1)
    scene.play()
    assert scene.finished["a"] == (12 if kind == "hand-off" else 20)
    assert scene.outcomes == ([] if kind == "hand-off" else ["TransportError"])
    check_migration_works(scene, SOURCE[kind], TARGET[kind])


# At any moment.


def moments(kind: str) -> tuple[range, range]:
    """The events, and the numbers of the messages sent, from just before the offer until the
    request has arrived for good."""
    scene = SCENES[kind]()
    at: list[tuple[int, int]] = []
    for known in (Offer, Accepted):
        scene.before(known, lambda: at.append((scene.events, scene.sends)))
    scene.play()
    (first, first_send), (last, last_send) = at
    return range(first - 8, last + 8), range(first_send - 2, last_send + 2)


@pytest.mark.parametrize("victims", ["source", "target", "source and target"])
@pytest.mark.parametrize("kind", SCENES)
def test_instances_may_die_at_any_moment(kind, victims):
    for moment in moments(kind)[0]:
        scene = SCENES[kind]()
        for role, names in (("source", SOURCE), ("target", TARGET)):
            if role in victims:
                scene.at_event(moment, lambda name=names[kind], scene=scene: scene.end(name))
        play_and_check(scene, kind)


@pytest.mark.parametrize("kind", SCENES)
def test_a_client_may_leave_at_any_moment(kind):
    for moment in moments(kind)[0]:
        scene = SCENES[kind]()
        scene.at_event(moment, lambda scene=scene: scene.cancel("a"))
        play_and_check(scene, kind)


@pytest.mark.parametrize("kind", SCENES)
def test_any_message_may_be_lost(kind):
    for number in moments(kind)[1]:
        scene = SCENES[kind]()
        scene.lose_send(number)
        play_and_check(scene, kind)
