"""A server that is measured for a profile: what its clients see beyond its passes."""

from cluster.profiling.serving import USERS, Serving, measure_serving


def test_every_loop_of_a_server_is_timed():
    done = []
    entries = measure_serving(Serving("demo", 1, (1,)), done.append)
    assert [entry["users"] for entry in entries] == list(USERS)
    assert done == list(range(1, len(USERS) + 1))
    for entry in entries:
        assert entry["instances"] == 1
        assert min(entry["ttft_s"], entry["tpot_s"]) > 0.0
