"""A server that is measured for a profile: what its clients see beyond its passes."""

from cluster.profiling.serving import LOOPS, Serving, measure_serving


def test_every_loop_of_a_server_is_timed():
    done = []
    entries = measure_serving(Serving("demo", 1, (1,)), done.append)
    assert [entry["users"] for entry in entries] == [loop.users for loop in LOOPS]
    assert done == list(range(1, len(LOOPS) + 1))
    for loop, entry in zip(LOOPS, entries, strict=True):
        assert entry["instances"] == 1
        assert entry["requests"] == loop.users * loop.turns
        assert min(entry["ttft_s"], entry["tpot_s"], entry["doors_s"]) > 0.0
