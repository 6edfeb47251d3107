"""A server that is measured for a profile: what its clients see beyond its passes."""

from cluster.profiling.serving import LOOPS, Serving, measure_serving


def test_every_loop_of_a_server_is_timed():
    done = []
    entries = measure_serving(Serving("demo", 1, (1,), 2048, lasting_s=0.0), done.append)
    assert [entry["users"] for entry in entries] == [loop.users for loop in LOOPS]
    assert done == list(range(1, len(LOOPS) + 1))
    for loop, entry in zip(LOOPS, entries, strict=True):
        assert entry["instances"] == 1
        assert entry["requests"] == loop.users * loop.turns
        assert entry["ttft_s"] > entry["prefill_s"] > 0.0
        assert min(entry[part] for part in ("tpot_s", "passes_s", "loops_s", "doors_s")) > 0.0


def test_loops_longer_than_the_model_are_left_out():
    short = Serving("demo", 1, (1,), 64)
    assert [loop for loop in LOOPS if loop not in short.fitting]
    assert all(loop.prompt_tokens + loop.output_tokens <= 64 for loop in short.fitting)
    assert short.loops == len(short.fitting)
