import pytest

from cluster.cli.progress import STAGES, stage_text
from cluster.control.controller import InstanceReport
from cluster.instance.warm_up import warm_up, warm_up_batches
from cluster.roster import InstanceSpec
from engine.cuda_graphs import rows_of, width_of
from engine.messages import Role
from tests.cluster.engines import BLOCK_TOKENS, BLOCKS, engine
from tests.cluster.test_host import CountingExecutor
from tests.engine import tiny

LONGEST = 1 << 17


def blocks_of(batch) -> list[int]:
    return [block for chunk in batch.chunks for block in chunk.blocks]


def test_a_warm_up_meets_a_prompt_decode_steps_and_both_together():
    first, *steps, both = warm_up_batches(64, 4, 30, 20, longest=LONGEST)
    assert [len(chunk.tokens) for chunk in first.chunks] == [30]
    assert [len(step.chunks) for step in steps] == [1, 2, 4, 8, 16, 20]
    assert len(both.chunks) == 21


def test_decode_steps_meet_each_width_of_tables_that_contexts_like_the_prompt_need():
    _, *steps, _ = warm_up_batches(500, 16, 5000, 4, longest=LONGEST)
    met = [
        (rows_of(len(step.chunks)), width_of(max(len(chunk.blocks) for chunk in step.chunks)))
        for step in steps
    ]
    assert met == [(rows, width) for width in (64, 256, 1024) for rows in (1, 2, 4)]
    assert all(chunk.end <= 5000 for step in steps for chunk in step.chunks)


@pytest.mark.parametrize("blocks", [2, 3, 9, 64, 300])
def test_no_two_chunks_of_a_batch_share_a_block_and_all_fit_the_pool(blocks):
    for batch in warm_up_batches(blocks, 4, 1000, 50, longest=LONGEST):
        used = blocks_of(batch)
        assert len(set(used)) == len(used)
        assert max(used) < blocks
        for chunk in batch.chunks:
            assert len(chunk.tokens) <= 4 * len(chunk.blocks)


def test_nothing_is_longer_than_the_model_takes():
    for batch in warm_up_batches(64, 4, 256, 8, longest=100):
        assert all(chunk.end <= 100 for chunk in batch.chunks)


def test_a_warm_up_can_be_left_out():
    assert warm_up_batches(64, 4, 0, 8, longest=LONGEST) == []


def test_each_batch_is_told():
    told = []
    batches = warm_up_batches(64, 4, 10, 4, longest=LONGEST)
    warm_up(CountingExecutor(), batches, lambda done, whole: told.append((done, whole)))
    assert told == [(n + 1, len(batches)) for n in range(len(batches))]


def test_a_real_engine_runs_it_and_answers_afterwards_as_if_it_had_not(tmp_path):
    from tests.cluster.test_instance_engine import alone, ask

    tiny.make("llama3", tmp_path / "tiny", vocab_size=2048)
    with engine(tmp_path / "tiny", tmp_path / "meet", "mixed-0") as one:
        cold = alone(one, ask("greedy"))
        batches = warm_up_batches(BLOCKS, BLOCK_TOKENS, 60, 16, longest=LONGEST)
        warm_up(one.executor, batches, lambda *_: None)
        assert alone(one, ask("greedy")) == cold


def test_progress_is_told_in_per_cent_where_it_is_measured():
    spec = InstanceSpec("mixed-0", Role.MIXED, "cpu")
    shown = [stage_text(InstanceReport(spec, stage, 0.42, None, None)) for stage in STAGES]
    assert shown[STAGES.index("loading")] == "loading 42%"
    assert shown[STAGES.index("warming up")] == "warming up 42%"
    assert shown[-1] == "serving"
