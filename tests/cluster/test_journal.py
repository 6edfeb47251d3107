from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.gateway.entry import Deliver, Fail, JournalSettings, Reroute, Send
from cluster.gateway.journal import Journal
from engine.errors import (
    BadRequest,
    DeadlineExceeded,
    InstanceLost,
    OutOfBlocks,
    PoisonRequest,
)
from engine.messages import (
    Abort,
    Accepted,
    Claim,
    Dropped,
    InstanceState,
    Kept,
    Load,
    Lost,
    Migrate,
    Resume,
    Role,
    Running,
    Start,
    Token,
    Verdict,
)
from engine.request import FinishReason, Request, Sampling
from placement.routing.router import Route
from tests.cluster.fakes import EchoInstance, hash_tokens

REQUEST = Request("r", (1, 2, 3), Sampling(max_tokens=4))
SPLIT = Route("prefill-0", "decode-0")
ALONE = Route("mixed-0")


def journal_with(route: Route, **limits) -> Journal:
    journal = Journal(JournalSettings(**limits))
    journal.open(REQUEST, route, 0.0)
    return journal


def token(epoch: int, index: int, finish: FinishReason | None = None) -> Token:
    return Token("r", epoch, index, 100 + index, finish)


def delivered(actions) -> list[int]:
    return [action.token.index for action in actions if isinstance(action, Deliver)]


def sent(actions) -> list[tuple[str, object]]:
    return [(action.to, action.message) for action in actions if isinstance(action, Send)]


def test_the_epoch_of_a_hand_off_that_was_given_up_is_not_used_again():
    journal = journal_with(SPLIT)
    assert sent(journal.receive("prefill-0", Kept("r", 1), 0.1)) == [("decode-0", Abort("r", 2))]
    refused = journal.claim("prefill-0", Claim("r", 1, 2, "decode-0"))
    assert sent(refused) == [("prefill-0", Verdict("r", 2, granted=False))]
    journal.lost("prefill-0", 0.2)
    ((to, start),) = sent(journal.restart("r", Route("decode-0"), 0.3))
    assert (to, start.epoch) == ("decode-0", 3)


def test_a_route_fixes_both_epochs_beforehand():
    actions = Journal().open(REQUEST, SPLIT, 0.0)
    assert sent(actions) == [("prefill-0", Start(REQUEST, 1, (), "decode-0", 2))]


def test_the_first_token_of_the_granted_epoch_moves_the_owner_and_frees_the_former():
    journal = journal_with(SPLIT)
    assert delivered(journal.token("prefill-0", token(1, 0), 0.0)) == [0]
    actions = journal.token("decode-0", token(2, 1), 0.0)
    assert delivered(actions) == [1]
    assert sent(actions) == [("prefill-0", Accepted("r", 2))]
    assert journal.find("r").owner == "decode-0"


def test_the_decode_sides_token_waits_for_the_prefills_when_it_overtakes_it():
    journal = journal_with(SPLIT)
    assert journal.token("decode-0", token(2, 1), 0.0) == []
    assert delivered(journal.token("prefill-0", token(1, 0), 0.1)) == [0, 1]
    assert journal.find("r").epoch == 2


def test_a_duplicate_or_a_stale_owners_token_is_not_delivered():
    journal = journal_with(SPLIT)
    journal.token("prefill-0", token(1, 0), 0.0)
    assert journal.token("prefill-0", token(1, 0), 0.0) == []
    journal.token("decode-0", token(2, 1), 0.0)
    assert journal.token("prefill-0", token(1, 2), 0.0) == [Send("prefill-0", Abort("r", 1))]


def test_an_id_that_is_used_again_begins_behind_the_epochs_of_its_former_life():
    journal = journal_with(SPLIT)
    assert sent(journal.abort("r")) == [("prefill-0", Abort("r", 2)), ("decode-0", Abort("r", 2))]
    again = sent(journal.open(REQUEST, SPLIT, 1.0))
    assert again == [("prefill-0", Start(REQUEST, 3, (), "decode-0", 4))]
    assert sent(journal.token("decode-0", token(2, 0), 1.1)) == [("decode-0", Abort("r", 2))]
    assert delivered(journal.token("prefill-0", token(3, 0), 1.1)) == [0]


def test_an_unknown_request_is_answered_with_abort():
    stray = Token("nobody", 3, 0, 1)
    assert Journal().token("decode-9", stray, 0.0) == [Send("decode-9", Abort("nobody", 3))]


def test_the_last_token_closes_the_entry_and_releases_a_target_that_is_not_needed():
    journal = journal_with(SPLIT)
    actions = journal.token("prefill-0", token(1, 0, FinishReason.STOP), 0.0)
    assert sent(actions) == [("decode-0", Abort("r", 2))]
    assert len(journal) == 0


def test_a_claim_is_a_compare_and_swap():
    journal = journal_with(ALONE)
    journal.token("mixed-0", token(1, 0), 0.0)
    claim = Claim("r", 1, 2, "mixed-1")
    yes = [Send("mixed-0", Verdict("r", 2, granted=True))]
    assert journal.claim("mixed-0", claim) == yes
    assert journal.claim("mixed-0", claim) == yes, "asking again gives the same answer"
    rival = replace(claim, target="mixed-2")
    assert journal.claim("mixed-0", rival) == [Send("mixed-0", Verdict("r", 2, granted=False))]


def test_a_claim_from_a_former_owner_is_refused_and_it_is_told_to_let_go():
    journal = journal_with(SPLIT)
    journal.token("prefill-0", token(1, 0), 0.0)
    journal.token("decode-0", token(2, 1), 0.0)
    assert sent(journal.claim("prefill-0", Claim("r", 1, 3, "decode-1"))) == [
        ("prefill-0", Verdict("r", 3, granted=False)),
        ("prefill-0", Abort("r", 1)),
    ]


def test_a_claim_for_a_lost_target_is_refused():
    journal = journal_with(ALONE)
    journal.lost("mixed-1", 0.0)
    assert sent(journal.claim("mixed-0", Claim("r", 1, 2, "mixed-1"))) == [
        ("mixed-0", Verdict("r", 2, granted=False))
    ]


def test_a_target_lost_before_its_first_token_costs_a_resume_not_a_replay():
    journal = journal_with(ALONE)
    journal.token("mixed-0", token(1, 0), 0.0)
    journal.claim("mixed-0", Claim("r", 1, 2, "mixed-1"))
    assert sent(journal.lost("mixed-1", 1.0)) == [("mixed-0", Resume("r", 1, 3))]
    assert delivered(journal.token("mixed-0", token(3, 1), 1.0)) == [1]
    assert journal.token("mixed-1", token(2, 1), 1.0) == [Send("mixed-1", Abort("r", 2))]


def test_a_resume_that_went_missing_is_sent_again_when_the_source_reports():
    journal = journal_with(ALONE)
    mixed = EchoInstance("mixed-0")
    mixed.receive("gateway-0", Start(REQUEST, 1))
    journal.claim("mixed-0", Claim("r", 1, 2, "mixed-1"))
    journal.lost("mixed-1", 1.0)
    assert sent(journal.load(mixed.load(), 1.1)) == [("mixed-0", Resume("r", 1, 3))]


def test_a_source_lost_after_its_claim_leaves_the_request_to_the_target():
    journal = journal_with(ALONE)
    journal.claim("mixed-0", Claim("r", 1, 2, "mixed-1"))
    assert journal.lost("mixed-0", 1.0) == []
    assert journal.find("r").owner == "mixed-1"
    assert delivered(journal.token("mixed-1", token(2, 0), 1.0)) == [0]


def test_a_lost_owner_is_replayed_from_the_next_token():
    journal = journal_with(ALONE)
    journal.token("mixed-0", token(1, 0), 0.0)
    assert journal.lost("mixed-0", 1.0) == [Reroute("r", ("mixed-0",), "mixed-0 is lost")]
    actions = journal.restart("r", Route("prefill-0", "decode-0"), 1.1)
    assert sent(actions) == [("prefill-0", Start(REQUEST, 2, (100,), "decode-0", 3))]
    assert journal.token("mixed-0", token(1, 1), 1.2) == [Send("mixed-0", Abort("r", 1))]
    assert delivered(journal.token("prefill-0", token(2, 1), 1.3)) == [1]


def test_a_lost_handoff_target_takes_the_request_from_prefill_and_replays_it():
    journal = journal_with(SPLIT)
    journal.token("prefill-0", token(1, 0), 0.0)
    actions = journal.lost("decode-0", 1.0)
    assert sent(actions) == [("prefill-0", Abort("r", 2))]
    assert actions[-1] == Reroute("r", ("decode-0",), "decode-0 is lost")
    assert journal.find("r").epoch == 3


def test_replays_are_bounded_but_progress_earns_more():
    journal = journal_with(ALONE, replays=2, crashes=100)
    for index in range(4):
        journal.lost("mixed-0", 1.0)
        journal.restart("r", ALONE, 1.0)
        journal.token("mixed-0", token(journal.find("r").epoch, index), 1.0)
    for _ in range(2):
        journal.lost("mixed-0", 2.0)
        journal.restart("r", ALONE, 2.0)
    (failure,) = journal.lost("mixed-0", 3.0)
    assert isinstance(failure, Fail)
    assert isinstance(failure.error, InstanceLost)
    assert len(journal) == 0


def test_an_instance_that_drained_was_brought_down_by_no_request():
    journal = journal_with(ALONE, crashes=1)
    leaving = replace(EchoInstance("mixed-0").load(), state=InstanceState.DRAINING)
    journal.load(leaving, 0.5)
    assert isinstance(journal.lost("mixed-0", 1.0)[-1], Reroute)
    assert journal.find("r").crashes == 0
    journal.restart("r", ALONE, 1.0)
    journal.load(EchoInstance("mixed-0").load(), 1.5)
    assert isinstance(journal.lost("mixed-0", 2.0)[-1].error, PoisonRequest)


def test_bad_input_found_by_an_instance_fails_at_once():
    journal = journal_with(ALONE)
    dropped = Dropped("r", 1, "BadRequest", "the grammar is empty")
    *aborts, failure = journal.dropped("mixed-0", dropped, 0.0)
    assert isinstance(failure.error, BadRequest)
    assert sent(aborts) == [("mixed-0", Abort("r", 1))]


def test_a_handoff_target_without_blocks_makes_a_replay():
    journal = journal_with(SPLIT)
    actions = journal.dropped("decode-0", Dropped("r", 2, "OutOfBlocks", "full"), 0.0)
    assert isinstance(actions[-1], Reroute)
    assert actions[-1].avoid == ("decode-0",)
    assert journal.dropped("prefill-0", Dropped("r", 1, "TransferError", "no"), 0.0) == []


def test_a_request_waits_for_a_route_only_so_long():
    journal = journal_with(ALONE, reroute_s=5.0)
    journal.lost("mixed-0", 1.0)
    assert journal.tick(5.0) == []
    (failure,) = journal.tick(6.5)
    assert isinstance(failure.error, DeadlineExceeded)


def test_a_gap_in_the_tokens_is_recomputed():
    journal = journal_with(ALONE, gap_s=1.0)
    journal.token("mixed-0", token(1, 1), 0.0)
    assert journal.tick(0.9) == []
    actions = journal.tick(1.1)
    assert sent(actions) == [("mixed-0", Abort("r", 1))]
    assert isinstance(actions[-1], Reroute)


def test_an_owner_that_does_not_list_the_request_has_lost_its_start():
    journal = journal_with(ALONE, vanish_s=3.0)
    idle = EchoInstance("mixed-0")
    journal.load(idle.load(), 2.0)
    assert journal.tick(2.0) == []
    journal.load(idle.load(), 3.5)
    assert isinstance(journal.tick(3.5)[-1], Reroute)


def test_an_ended_request_that_an_instance_still_lists_is_aborted_there():
    journal = journal_with(ALONE)
    mixed = EchoInstance("mixed-0")
    mixed.receive("gateway-0", Start(REQUEST, 1))
    assert sent(journal.abort("r")) == [("mixed-0", Abort("r", 1))]
    assert sent(journal.load(mixed.load(), 1.0)) == [("mixed-0", Abort("r", 1))]
    assert journal.abort("r") == []


def listing(instance: str, epoch: int, state: str) -> Load:
    held = Running("r", epoch, state, 0, 3, 0, 1)
    sizes = {"total_blocks": 8, "block_tokens": 4, "pinned_blocks": 0, "cached_blocks": 0}
    return Load(
        instance,
        Role.MIXED,
        InstanceState.READY,
        0,
        0,
        0,
        0,
        7,
        step_s=0.1,
        sequences=(held,),
        **sizes,
    )


def test_kv_that_moves_ahead_of_its_claim_is_left_alone():
    journal = journal_with(ALONE)
    assert journal.load(listing("mixed-1", 2, "copying"), 0.1) == []
    assert sent(journal.load(listing("mixed-1", 2, "running"), 0.2)) == [("mixed-1", Abort("r", 2))]


def test_a_former_owner_that_still_lists_what_it_gave_away_hears_that_it_was_accepted():
    journal = journal_with(ALONE)
    journal.token("mixed-0", token(1, 0), 0.0)
    journal.claim("mixed-0", Claim("r", 1, 2, "mixed-1"))
    journal.token("mixed-1", token(2, 1), 0.1)
    assert sent(journal.load(listing("mixed-0", 1, "committed"), 0.2)) == [
        ("mixed-0", Accepted("r", 2))
    ]


def test_kv_that_moves_for_an_owner_that_was_replaced_is_dropped():
    journal = journal_with(SPLIT)
    journal.lost("decode-0", 0.1)
    assert sent(journal.load(listing("decode-0", 2, "copying"), 0.2)) == [
        ("decode-0", Abort("r", 2))
    ]


def test_another_gateways_requests_are_left_alone():
    mixed = EchoInstance("mixed-0")
    mixed.receive("gateway-1", Start(REQUEST, 1))
    assert Journal().load(mixed.load(), 0.0) == []


class Chaos:
    """A journal, five instances and a network that loses, repeats and reorders."""

    NAMES = ("prefill-0", "decode-0", "decode-1", "mixed-0", "mixed-1")

    def __init__(self, draw) -> None:
        self.draw = draw
        self.now = 0.0
        self.journal = Journal(JournalSettings(gap_s=0.5, vanish_s=1.0, replays=1000, crashes=1000))
        self.instances = {name: EchoInstance(name, self._role(name)) for name in self.NAMES}
        self.network: list[tuple[str, str, object]] = []
        self.received: list[int] = []
        self.request = Request("r", (1, 2), Sampling(max_tokens=6, seed=7))
        self.routes = 0
        self.act(self.journal.open(self.request, self.route(), 0.0))

    @staticmethod
    def _role(name: str) -> Role:
        return Role(name.split("-", maxsplit=1)[0])

    def route(self) -> Route:
        self.routes += 1
        options = [SPLIT, ALONE, Route("prefill-0", "decode-1"), Route("mixed-1")]
        return options[self.routes % len(options)]

    def act(self, actions) -> None:
        for action in actions:
            match action:
                case Send(to, message):
                    self.network.append(("gateway-0", to, message))
                case Deliver(one):
                    assert one.index == len(self.received), "out of order or twice"
                    self.received.append(one.token)
                case Reroute(request_id):
                    self.act(self.journal.restart(request_id, self.route(), self.now))
                case Fail(_, error):
                    raise error

    def deliver(self, at: int, *, keep: bool = False) -> None:
        sender, to, message = self.network[at]
        if not keep:
            del self.network[at]
        if to == "gateway-0":
            self.act(self.journal.receive(sender, message, self.now))
        else:
            self.instances[to].receive(sender, message)
            self.collect(to)

    def collect(self, name: str) -> None:
        for to, message in self.instances[name].take_outbox():
            self.network.append((name, to, message))

    def step(self, name: str) -> None:
        self.instances[name].step()
        self.collect(name)

    def die(self, name: str) -> None:
        self.instances[name] = EchoInstance(name, self._role(name))
        self.network = [one for one in self.network if name not in one[:2]]
        self.act(self.journal.receive("controller", Lost(name), self.now))

    def heal(self) -> None:
        """From here on nothing is lost: every message arrives, everybody reports."""
        for _ in range(200):
            if len(self.journal) == 0 and not self.network:
                break
            while self.network:
                self.deliver(0)
            self.now += 0.3
            for name in self.NAMES:
                self.instances[name].ask_again()
                self.step(name)
                self.act(self.journal.load(self.instances[name].load(), self.now))
            self.act(self.journal.tick(self.now))

    def play(self, moves: int) -> None:
        for _ in range(moves):
            move = self.draw(st.sampled_from(["step", "deliver", "repeat", "lose", "migrate",
                "die", "later", "report"]))  # fmt: skip
            name = self.draw(st.sampled_from(self.NAMES))
            at = self.draw(st.integers(0, 30)) % len(self.network) if self.network else None
            self.now += 0.01
            match move:
                case "step":
                    self.step(name)
                case "deliver" | "repeat" if at is not None:
                    self.deliver(at, keep=move == "repeat")
                case "lose" if at is not None:
                    del self.network[at]
                case "migrate":
                    target = self.draw(st.sampled_from(self.NAMES))
                    if target != name:
                        self.instances[name].receive("controller", Migrate("r", target, "test"))
                        self.collect(name)
                case "die":
                    self.die(name)
                case "later":
                    self.now += 0.6
                    self.act(self.journal.tick(self.now))
                case "report":
                    self.act(self.journal.load(self.instances[name].load(), self.now))


@pytest.mark.parametrize("moves", [30, 120])
@settings(max_examples=120, deadline=None)
@given(data=st.data())
def test_each_token_is_delivered_once_and_in_order_whatever_the_network_does(moves, data):
    chaos = Chaos(data.draw)
    chaos.play(moves)
    chaos.heal()
    assert chaos.received == hash_tokens(chaos.request)
    assert len(chaos.journal) == 0
    for instance in chaos.instances.values():
        assert instance.sequences == {}, "an instance holds on to an ended request"


def test_a_request_larger_than_every_pool_ends_with_the_sizes():
    journal = journal_with(SPLIT)
    for name in ("prefill-0", "decode-0"):
        journal.load(EchoInstance(name, total_blocks=0).load(), 0.0)
    actions = journal.dropped("prefill-0", Dropped("r", 1, "OutOfBlocks", "too small"), 0.0)
    (failure,) = [action for action in actions if isinstance(action, Fail)]
    assert isinstance(failure.error, OutOfBlocks)
    assert (failure.error.wanted, failure.error.free) == (1, 0)


def test_a_request_that_fails_or_kills_whatever_runs_it_ends_by_name():
    journal = journal_with(ALONE, crashes=3)
    failed = Dropped("r", 1, "BatchFailed", "BadLogits: not finite")
    assert isinstance(journal.dropped("mixed-0", failed, 0.0)[-1], Reroute)
    journal.restart("r", ALONE, 0.0)
    journal.token("mixed-0", token(2, 0), 0.0)
    assert isinstance(journal.lost("mixed-0", 0.0)[-1], Reroute)
    journal.load(EchoInstance("mixed-0").load(), 0.0)
    journal.restart("r", ALONE, 0.0)
    (failure,) = [one for one in journal.lost("mixed-0", 0.0) if isinstance(one, Fail)]
    assert isinstance(failure.error, PoisonRequest)
    assert str(failure.error).startswith("r brought down 3 attempts in a row")
    assert len(journal) == 0


def test_crashes_far_apart_are_nobodys_fault():
    long = replace(REQUEST, sampling=Sampling(max_tokens=100))
    journal = Journal(JournalSettings(crashes=2, progress_tokens=4))
    journal.open(long, ALONE, 0.0)
    for attempt in range(5):
        for index in range(attempt * 4, attempt * 4 + 4):
            journal.token("mixed-0", token(attempt + 1, index), 0.0)
        assert isinstance(journal.lost("mixed-0", 0.0)[-1], Reroute)
        journal.load(EchoInstance("mixed-0").load(), 0.0)
        journal.restart("r", ALONE, 0.0)


def test_suspects_go_one_at_a_time():
    journal = Journal()
    for name in ("a", "b"):
        journal.open(replace(REQUEST, id=name, sampling=Sampling(max_tokens=50)), ALONE, 0.0)
    for _ in range(2):
        journal.lost("mixed-0", 0.0)
        assert journal.may_restart("a")
        journal.restart("a", ALONE, 0.0)
        if journal.may_restart("b"):
            journal.restart("b", ALONE, 0.0)
    assert journal.find("b").owner is None
    for index in range(16):
        journal.token("mixed-0", Token("a", 3, index, 1), 0.0)
    assert journal.may_restart("b")


def test_waiting_behind_another_suspect_does_not_count_against_the_time_for_a_route():
    journal = Journal(JournalSettings(reroute_s=5.0, gap_s=1000.0))
    for name in ("a", "b"):
        journal.open(replace(REQUEST, id=name, sampling=Sampling(max_tokens=50)), ALONE, 0.0)
    journal.lost("mixed-0", 0.0)
    journal.restart("a", ALONE, 0.0)
    journal.restart("b", ALONE, 0.0)
    journal.lost("mixed-0", 0.0)
    journal.load(EchoInstance("mixed-0").load(), 0.0)
    journal.restart("a", ALONE, 0.0)
    assert journal.tick(100.0) == []
    for index in range(16):
        journal.token("mixed-0", Token("a", 3, index, 1), 100.0)
    assert journal.tick(104.0) == []
    (failure,) = journal.tick(106.0)
    assert failure.request_id == "b"
    assert isinstance(failure.error, DeadlineExceeded)
