from dataclasses import replace

import pytest

from engine.messages import InstanceState, Load, Role, Running
from engine.request import Request, Sampling
from engine.slo import Slo
from placement.line import Line
from placement.routing.prefixes import PrefixIndex
from placement.routing.router import Policy, Router, RouterSettings
from placement.view import InstanceView, View


def load(name: str, **known) -> Load:
    role = Role(name.split("-", maxsplit=1)[0])
    idle = Load(
        instance=name, role=role, state=InstanceState.READY, queue_requests=0, queued_tokens=0,
        running_sequences=0, running_tokens=0, free_blocks=1000, total_blocks=1000,
        block_tokens=16, pinned_blocks=0, cached_blocks=0, step_s=0.02, sequences=(),
    )  # fmt: skip
    return replace(idle, **known)


def view(*loads: Load) -> View:
    return View(0.0, tuple(InstanceView(one) for one in sorted(loads, key=lambda x: x.instance)))


def request(name: str = "r", tokens: int = 600, start: int = 0, **options) -> Request:
    prompt = tuple(range(start, start + tokens))
    return Request(name, prompt, Sampling(max_tokens=100), Slo(2.0, 0.1), **options)


def chosen(router: Router, seen: View, asked: Request | None = None, avoid=()):
    route = router.choose(asked or request(), seen, avoid)
    return None if route is None else (route.prefill, route.decode)


def test_no_instance_means_no_route_yet():
    assert chosen(Router(), view()) is None
    draining = load("mixed-0", state=InstanceState.DRAINING)
    assert chosen(Router(), view(draining)) is None


def test_the_prefill_with_the_fewest_tokens_to_compute_and_the_freest_decode():
    seen = view(
        load("prefill-0", queued_tokens=5000), load("prefill-1", queued_tokens=100),
        load("decode-0", free_blocks=100, running_sequences=9), load("decode-1"),
    )  # fmt: skip
    assert chosen(Router(), seen) == ("prefill-1", "decode-1")


def test_a_cached_prefix_outweighs_a_short_queue():
    seen = view(load("prefill-0"), load("prefill-1", queued_tokens=100), load("decode-0"))
    router = Router()
    first = request("a")
    route = router.choose(first, seen)
    assert route.prefill == "prefill-0"
    router.dispatched(first, replace(route, prefill="prefill-1"), 0.0)
    router.ended("a")
    again = router.choose(request("b"), seen)
    assert (again.prefill, again.cached_tokens) == ("prefill-1", 576)


def side_by_side(*loads: Load) -> View:
    """prefill-0 beside decode-0 on node-0, prefill-1 beside decode-1 on node-1."""
    seen = view(*loads).instances
    return View(0.0, tuple(replace(one, node=f"node-{one.id[-1]}") for one in seen))


def crossing(seconds: float) -> Router:
    return Router(RouterSettings(crossing_token_s=seconds))


def test_where_kv_is_slow_to_leave_a_node_the_pair_on_one_is_preferred():
    seen = side_by_side(
        load("prefill-0", queued_tokens=200), load("decode-0"),
        load("prefill-1"), load("decode-1", step_s=0.022),
    )  # fmt: skip
    assert chosen(Router(), seen) == ("prefill-1", "decode-0")
    assert chosen(crossing(1e-4), seen) == ("prefill-1", "decode-1")


def test_both_ends_of_a_hand_off_count_in_which_node_it_stays_on():
    seen = side_by_side(
        load("prefill-0", queued_tokens=50), load("decode-0"),
        load("prefill-1"), load("decode-1", free_blocks=500),
    )  # fmt: skip
    assert chosen(crossing(1e-4), seen) == ("prefill-0", "decode-0")


@pytest.mark.parametrize("seconds", [1e-6, 1e-4, 1e-1])
@pytest.mark.parametrize("much", [{"free_blocks": 0}, {"step_s": 0.15}])
def test_a_full_or_overloaded_partner_is_passed_over_however_slow_the_network_is(seconds, much):
    seen = side_by_side(load("prefill-0"), load("decode-0", **much), load("decode-1"))
    assert chosen(crossing(seconds), seen) == ("prefill-0", "decode-1")


def test_where_no_instances_lie_side_by_side_or_nobody_knows_nothing_changes():
    loads = [load("prefill-0", queued_tokens=9), load("prefill-1"), load("decode-0"),
             load("decode-2", free_blocks=500)]  # fmt: skip
    apart = View(0.0, tuple(replace(one, node=one.id) for one in view(*loads).instances))
    for seen in (apart, view(*loads)):
        assert chosen(crossing(1e-4), seen) == chosen(Router(), seen) == ("prefill-1", "decode-0")


def test_an_instance_that_comes_back_on_another_node_is_known_to_be_there():
    router = crossing(1e-4)
    seen = side_by_side(load("prefill-0"), load("decode-0"), load("decode-1"))
    assert chosen(router, seen) == ("prefill-0", "decode-0")
    swapped = {"decode-0": "node-1", "decode-1": "node-0"}
    moved = [replace(one, node=swapped.get(one.id, one.node)) for one in seen.instances]
    assert chosen(router, View(1.0, tuple(moved))) == ("prefill-0", "decode-1")


def test_tenants_do_not_share_prefixes():
    seen = view(load("mixed-0"), load("mixed-1"))
    router = Router()
    mine = request("a", tenant="alice")
    router.dispatched(mine, router.choose(mine, seen), 0.0)
    assert router.choose(request("b", tenant="bob"), seen).cached_tokens == 0


def test_the_whole_text_of_an_ended_request_is_a_prefix_where_it_was_decoded():
    seen = view(load("mixed-0"), load("mixed-1"))
    router = Router()
    first = request("a", tokens=160)
    router.dispatched(first, replace(router.choose(first, seen), prefill="mixed-1"), 0.0)
    router.ended("a", tuple(range(320)))
    follow_up = router.choose(request("b", tokens=400), seen)
    assert (follow_up.prefill, follow_up.cached_tokens) == ("mixed-1", 320)


def test_what_was_just_dispatched_counts_until_the_instance_confirms_it():
    router = Router()
    seen = view(load("prefill-0"), load("prefill-1"), load("decode-0"))
    first = request("a", start=10_000)
    router.dispatched(first, router.choose(first, seen), 0.0)
    assert router.choose(request("b"), seen).prefill == "prefill-1"
    running = Running("a", 1, "waiting", 0, 600, 0, 38)
    confirmed = view(
        load("prefill-0", sequences=(running,), queued_tokens=0), load("prefill-1"),
        load("decode-0"),
    )  # fmt: skip
    assert router.choose(request("b"), confirmed).prefill == "prefill-0"


def test_a_first_token_or_an_end_empties_the_ledger():
    router = Router()
    seen = view(load("prefill-0"), load("decode-0"), load("decode-1"))
    first = request("a")
    router.dispatched(first, router.choose(first, seen), 0.0)
    router.prefilled("a", 0.3)
    router.ended("a")
    for instance in router._instances.values():
        assert (instance.ledger, instance.ahead_tokens, instance.left_blocks) == ({}, 0, 1000)
    assert router._under_way == {}


def test_a_full_pool_is_avoided():
    seen = view(load("prefill-0"), load("decode-0", free_blocks=10), load("decode-1"))
    assert chosen(Router(), seen)[1] == "decode-1"


def test_room_that_others_wait_for_is_not_free():
    seen = view(
        load("prefill-0"),
        load("decode-0", free_blocks=900, wanted_blocks=899),
        load("decode-1", free_blocks=300),
    )
    assert chosen(Router(), seen)[1] == "decode-1"


def test_a_short_prompt_goes_to_a_decode_instance_when_prefill_is_behind():
    busy = view(load("prefill-0", queued_tokens=20_000), load("decode-0"))
    assert chosen(Router(), busy, request(tokens=100)) == ("decode-0", None)
    idle = view(load("prefill-0"), load("decode-0"))
    assert chosen(Router(), idle, request(tokens=100)) == ("prefill-0", "decode-0")


def test_a_decode_instance_without_slack_takes_no_prompt():
    seen = view(load("prefill-0", queued_tokens=20_000), load("decode-0", step_s=0.09))
    assert chosen(Router(), seen, request(tokens=100)) == ("prefill-0", "decode-0")


def test_a_long_prompt_never_goes_to_a_decode_instance():
    seen = view(load("prefill-0", queued_tokens=20_000), load("decode-0"))
    assert chosen(Router(), seen, request(tokens=600)) == ("prefill-0", "decode-0")


def test_while_a_role_is_missing_the_other_serves_alone():
    assert chosen(Router(), view(load("decode-0"))) == ("decode-0", None)
    assert chosen(Router(), view(load("prefill-0"))) == ("prefill-0", None)


def test_instances_to_avoid_are_taken_only_when_there_is_nobody_else():
    seen = view(load("mixed-0"), load("mixed-1"))
    assert chosen(Router(), seen, avoid=("mixed-0",)) == ("mixed-1", None)
    assert chosen(Router(), view(load("mixed-0")), avoid=("mixed-0",)) == ("mixed-0", None)


def test_a_mixed_instance_competes_with_a_pair():
    seen = view(load("prefill-0", queued_tokens=9000), load("decode-0"), load("mixed-0"))
    assert chosen(Router(), seen) == ("mixed-0", None)


def test_round_robin_takes_turns():
    router = Router(RouterSettings(policy=Policy.ROUND_ROBIN))
    seen = view(load("mixed-0"), load("mixed-1", queued_tokens=9999), load("mixed-2"))
    names = []
    for n in range(4):
        asked = request(f"r{n}")
        route = router.choose(asked, seen)
        router.dispatched(asked, route, 0.0)
        names.append(route.prefill)
    assert names == ["mixed-0", "mixed-1", "mixed-2", "mixed-0"]


def test_least_loaded_counts_requests_and_pairs_roles():
    router = Router(RouterSettings(policy=Policy.LEAST_LOADED))
    seen = view(
        load("prefill-0", queue_requests=3), load("prefill-1", queue_requests=1),
        load("decode-0", running_sequences=2), load("decode-1", running_sequences=5),
    )  # fmt: skip
    assert chosen(router, seen) == ("prefill-1", "decode-0")


def test_predictions_follow_what_is_measured():
    router = Router()
    seen = view(load("prefill-0"), load("decode-0"))
    for n in range(20):
        asked = request(f"r{n}", tokens=100 + 50 * n, start=1000 * n)
        route = router.choose(asked, seen)
        router.dispatched(asked, route, 0.0)
        router.prefilled(asked.id, 0.05 + route.work_tokens / 500.0)
        router.ended(asked.id)
    assert router.measured
    route = router.choose(request("next", tokens=1000, start=90_000), seen)
    assert route.ttft_s == pytest.approx(2.05, rel=0.01)
    assert router.alone_s(route, 1000) == pytest.approx(2.05, rel=0.01)


def test_a_vanished_instance_is_forgotten_with_its_prefixes():
    router = Router()
    asked = request("a")
    both = view(load("mixed-0"), load("mixed-1"))
    router.dispatched(asked, router.choose(asked, both), 0.0)
    router.choose(asked, view(load("mixed-1")))
    assert len(router._prefixes) == 0
    router.ended("a")


def chain(*names: int) -> list[bytes]:
    return [bytes([name]) for name in names]


def test_hits_are_leading_blocks_only():
    index = PrefixIndex()
    index.remember("a", chain(1, 2, 3), 10)
    index.remember("b", chain(1, 2), 10)
    index.remember("c", chain(2, 3), 10)
    assert index.hits(chain(1, 2, 3, 4)) == {"a": 3, "b": 2}
    assert index.hits(chain(9)) == {}
    assert index.hits([]) == {}


def test_the_oldest_blocks_go_first_and_ends_before_beginnings():
    index = PrefixIndex()
    index.remember("a", chain(1, 2, 3), 4)
    index.remember("a", chain(7, 8), 4)
    assert index.hits(chain(1, 2, 3)) == {"a": 2}
    assert index.hits(chain(7, 8)) == {"a": 2}
    index.forget("a")
    assert len(index) == 0


def test_a_chain_longer_than_the_pool_keeps_its_beginning():
    index = PrefixIndex()
    index.remember("a", chain(1, 2, 3, 4), 2)
    assert index.hits(chain(1, 2, 3, 4)) == {"a": 2}


def test_a_line_is_fitted_and_never_falls():
    line = Line(1.0)
    for x in (1.0, 2.0, 3.0):
        line.observe(x, 2.0 + 3.0 * x)
    assert (line.base, line.slope) == (pytest.approx(2.0), pytest.approx(3.0))
    falling = Line(1.0)
    for x in (1.0, 2.0, 3.0):
        falling.observe(x, 4.0 - x)
    assert falling.slope > 0.0
    assert falling.base == 0.0
