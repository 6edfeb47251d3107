"""A server that is measured for a profile: what its clients see beyond its passes."""

from cluster.profiling.one_rank import RankSettings
from cluster.profiling.serving import Serving, loads_of, measure_serving


def prompt_pairs(server):
    return sum(step["count"] * step["pairs"] for step in server["steps"])


def test_servers_are_measured_under_load():
    done = []
    rank = RankSettings("demo")
    given = {"request_s": 0.05, "load_s": 0.0, "rounds": 2, "seed": 3, "most_tries": 1}
    settings = Serving(rank, (1, 2), 2048, **given)
    measured = measure_serving(settings, done.append)
    assert done == list(range(1, loads_of((1, 2), 2) + 1))
    one, two, pair, *again = measured["at_work"]
    assert [server["handed_off"] for server in again] == [False, False, True]
    assert prompt_pairs(again[0]) != prompt_pairs(one)
    assert all(server["other_cores"] >= 0.0 for server in measured["at_work"])
    assert one["way_s"] > 0.0
    assert one["way_steps"] >= 1.0
    assert pair["handoff_s"] >= 0.0
    # Fewer passes than a log keeps in memory: they are told because servers end in order.
    assert pair["way_steps"] >= 1.0
    assert [server["handed_off"] for server in (one, two, pair)] == [False, False, True]
    for server in (one, two, pair):
        steps = server["steps"]
        prompts = sum(step["count"] for step in steps if step["pairs"])
        assert 0 < prompts < sum(step["count"] for step in steps)
        assert all(step["processor_s"] > 0.0 for step in steps)
    assert not any(step["others"] for step in one["steps"])
    assert min(measured["speed"]["paces"]) > 0.0


def test_a_single_instance_is_measured_without_a_pair():
    assert loads_of((1,), 1) == 2
    assert loads_of((1, 2), 1) == 6
    assert loads_of((1, 2), 3) == 18
    assert loads_of((), 3) == 0
