"""The sampler against plain restatements of each option, and its independence of the batch."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engine.batch import Draw, Drawn
from engine.errors import BadLogits
from engine.random import uniforms
from engine.request import Sampling
from engine.sampler import Sampler

if TYPE_CHECKING:
    from collections.abc import Iterator

VOCAB = 333
EOS = 7


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def draw(sampling: Sampling, position: int = 0, output: tuple[int, ...] = ()) -> Draw:
    prompt = (1, 2, 3)
    history = (*prompt, *output) if sampling.reads_history else ()
    return Draw(sampling, position, len(prompt), history)


def sample(logits: torch.Tensor, *draws: Draw, vocab: int = VOCAB) -> list[Drawn]:
    sampler = Sampler(vocab, eos=frozenset({EOS}))
    return sampler.sample(logits.clone(), draws, [f"r{i}" for i in range(len(draws))])


def tokens(drawn: list[Drawn]) -> list[int]:
    return [one.token for one in drawn]


def random_logits(rows: int, seed: int = 0, vocab: int = VOCAB) -> torch.Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * 3


def survivors(logits: torch.Tensor, sampling: Sampling, draws: int = 3000) -> Counter[int]:
    """What is drawn over many positions from one row."""
    many = [draw(sampling, position) for position in range(draws)]
    return Counter(tokens(sample(logits.expand(draws, -1), *many, vocab=logits.shape[-1])))


def kept(logits: torch.Tensor, sampling: Sampling) -> dict[int, float]:
    """The tokens that min-p, top-k and top-p leave, and their shares, said the slow way."""
    probabilities = torch.softmax(logits.double() / sampling.temperature, 0).tolist()
    ranked = sorted(range(len(probabilities)), key=lambda i: (-probabilities[i], i))
    best = probabilities[ranked[0]]
    ranked = [i for i in ranked if probabilities[i] >= sampling.min_p * best]
    ranked = ranked[: sampling.top_k]
    total, mass, nucleus = sum(probabilities[i] for i in ranked), 0.0, []
    for i in ranked:
        if mass >= sampling.top_p * total:
            break
        nucleus.append(i)
        mass += probabilities[i]
    return {i: probabilities[i] / mass for i in nucleus}


def test_temperature_zero_takes_the_highest_logit() -> None:
    logits = random_logits(50)
    drawn = sample(logits, *[draw(Sampling(temperature=0.0))] * 50)
    assert tokens(drawn) == logits.argmax(1).tolist()


def test_ties_go_to_the_lowest_token() -> None:
    logits = torch.zeros(1, VOCAB)
    logits[0, [300, 40, 200]] = 5.0
    for sampling in (Sampling(temperature=0.0), Sampling(top_k=1), Sampling(top_p=1e-6)):
        assert tokens(sample(logits, draw(sampling))) == [40]


def test_a_vocabulary_that_fills_no_whole_piece_is_searched_to_its_end() -> None:
    for vocab in (1, 5, 127, 128, 129, 300):
        logits = torch.zeros(1, vocab)
        logits[0, vocab - 1] = 60.0
        for temperature in (0.0, 1.0):
            chosen = sample(logits, draw(Sampling(temperature=temperature)), vocab=vocab)
            assert tokens(chosen) == [vocab - 1]


def test_columns_past_the_vocabulary_are_never_drawn() -> None:
    logits = random_logits(1)
    logits[0, 200:] = 100.0
    assert tokens(sample(logits, draw(Sampling(temperature=0.0)), vocab=200))[0] < 200


def test_a_draw_is_where_the_cdf_crosses_the_uniform_number_of_seed_and_position() -> None:
    logits = random_logits(40)
    draws = [draw(Sampling(seed=9, temperature=0.8), position) for position in range(40)]
    cdf = torch.softmax(logits.double() / 0.8, 1).cumsum(1).numpy()
    numbers = uniforms([9] * 40, range(40))
    expected = [int(np.searchsorted(row, u, "right")) for row, u in zip(cdf, numbers, strict=True)]
    assert tokens(sample(logits, *draws)) == expected


def test_frequencies_follow_the_softmax() -> None:
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, float("-inf")])
    counts = survivors(logits, Sampling(temperature=1.0), draws=20_000)
    for token, share in enumerate(torch.softmax(logits, 0).tolist()):
        assert abs(counts[token] / 20_000 - share) < 0.012
    assert counts[4] == 0


FILTERS = [
    Sampling(top_k=5),
    Sampling(top_k=40, temperature=0.7),
    Sampling(top_p=0.5),
    Sampling(top_p=0.9, temperature=1.5),
    Sampling(min_p=0.1),
    Sampling(top_k=20, top_p=0.8),
    Sampling(top_k=200, top_p=0.95, min_p=0.02),
    Sampling(top_k=10_000, top_p=0.7),
]


@pytest.mark.parametrize("sampling", FILTERS)
def test_filters_leave_what_their_definitions_leave(sampling: Sampling) -> None:
    logits = random_logits(1, seed=4)[0]
    shares = kept(logits, sampling)
    counts = survivors(logits, sampling)
    assert set(counts) <= set(shares)
    for token, share in shares.items():
        assert abs(counts[token] / 3000 - share) < 0.04


@pytest.mark.parametrize("sampling", FILTERS)
def test_filters_hold_where_every_logit_is_equal(sampling: Sampling) -> None:
    logits = torch.zeros(VOCAB)
    assert set(survivors(logits, sampling)) <= set(kept(logits, sampling))


@given(st.integers(0, 10_000), st.floats(0.01, 0.999), st.integers(1, 400), st.floats(0, 1))
def test_a_filtered_draw_is_always_among_the_kept(
    seed: int, top_p: float, top_k: int, min_p: float
) -> None:
    logits = random_logits(1, seed=seed, vocab=150)
    sampling = Sampling(seed=seed, top_p=top_p, top_k=top_k, min_p=min_p)
    allowed = kept(logits[0], Sampling(top_p=min(1.0, top_p + 1e-5), top_k=top_k, min_p=min_p))
    assert sample(logits, draw(sampling), vocab=150)[0].token in allowed


OPTIONS = [
    Sampling(temperature=0.0),
    Sampling(temperature=0.9, seed=1),
    Sampling(temperature=1.0, seed=2, top_p=0.8),
    Sampling(temperature=1.3, seed=3, top_k=12, logprobs=3),
    Sampling(temperature=0.0, repetition_penalty=1.4, presence_penalty=0.5),
    Sampling(temperature=0.7, seed=4, min_p=0.05, frequency_penalty=0.3),
    Sampling(temperature=1.0, seed=5, logit_bias=((11, 4.0), (12, -4.0)), min_tokens=9),
]


@given(st.lists(st.integers(0, len(OPTIONS) - 1), min_size=1, max_size=40), st.randoms())
def test_a_row_gives_the_same_token_in_any_batch_and_any_order(
    kinds: list[int], rng: object
) -> None:
    draws = [
        draw(OPTIONS[kind], position, output=tuple(range(position)))
        for position, kind in enumerate(kinds)
    ]
    logits = random_logits(len(kinds), seed=len(kinds))
    together = sample(logits, *draws)
    order = list(range(len(kinds)))
    rng.shuffle(order)  # type: ignore[attr-defined]
    shuffled = sample(logits[order], *[draws[i] for i in order])
    for place, i in enumerate(order):
        alone = sample(logits[i : i + 1], draws[i])[0]
        assert (together[i].token, together[i].logprobs) == (alone.token, alone.logprobs)
        assert shuffled[place].token == alone.token


def test_a_row_of_a_large_vocabulary_does_not_see_its_neighbours_either() -> None:
    logits = random_logits(70, vocab=32_000)
    draws = [draw(OPTIONS[i % len(OPTIONS)], i, output=tuple(range(i))) for i in range(70)]
    together = sample(logits, *draws, vocab=32_000)
    for i, one in enumerate(draws):
        assert sample(logits[i : i + 1], one, vocab=32_000)[0].token == together[i].token


def test_repetition_covers_prompt_and_output_and_the_others_output_only() -> None:
    logits = torch.zeros(1, 10)
    logits[0] = torch.tensor([0.0, 4.0, -1.0, 3.9, 3.8, 3.7, 0.0, 0.0, 0.0, 0.0])
    greedy = {"temperature": 0.0}
    repeated = draw(Sampling(**greedy, repetition_penalty=2.0), 1, output=(4,))
    assert tokens(sample(logits, repeated, vocab=10)) == [5]
    present = draw(Sampling(**greedy, presence_penalty=1.0), 1, output=(1,))
    assert tokens(sample(logits, present, vocab=10)) == [3]
    prompt_only = draw(Sampling(**greedy, presence_penalty=1.0), 0)
    assert tokens(sample(logits, prompt_only, vocab=10)) == [1]


def test_frequency_counts_every_occurrence() -> None:
    logits = torch.zeros(2, 10)
    logits[:, 5], logits[:, 6] = 1.0, 0.5
    sampling = Sampling(temperature=0.0, frequency_penalty=0.2)
    twice, thrice = draw(sampling, 2, (5, 5)), draw(sampling, 3, (5, 5, 5))
    assert tokens(sample(logits, twice, thrice, vocab=10)) == [5, 6]


def test_a_repetition_penalty_lowers_negative_logits_too() -> None:
    logits = torch.full((1, 10), -9.0)
    logits[0, 1], logits[0, 8] = -1.0, -1.5
    sampling = Sampling(temperature=0.0, repetition_penalty=2.0)
    assert tokens(sample(logits, draw(sampling), vocab=10)) == [8]


def test_logit_bias_is_added() -> None:
    logits = torch.zeros(1, VOCAB)
    sampling = Sampling(temperature=0.0, logit_bias=((20, 1.0), (21, 2.0), (22, -100.0)))
    assert tokens(sample(logits, draw(sampling))) == [21]


def test_min_tokens_forbids_every_end_until_it_is_reached() -> None:
    logits = torch.zeros(3, VOCAB)
    logits[:, EOS], logits[:, 50], logits[:, 60] = 9.0, 8.0, 7.0
    sampling = Sampling(temperature=0.0, min_tokens=2, stop_token_ids=(50,))
    drawn = sample(logits, *[draw(sampling, position) for position in range(3)])
    assert tokens(drawn) == [60, 60, EOS]


def test_min_tokens_leaves_eos_alone_where_it_ends_nothing() -> None:
    logits = torch.zeros(1, VOCAB)
    logits[0, EOS] = 9.0
    sampling = Sampling(temperature=0.0, min_tokens=5, ignore_eos=True)
    assert tokens(sample(logits, draw(sampling))) == [EOS]


def test_logprobs_are_the_models_own_whatever_the_options() -> None:
    logits = random_logits(1)
    expected = torch.log_softmax(logits[0], 0)
    sampling = Sampling(temperature=0.0, logprobs=4, logit_bias=((9, 50.0),))
    (drawn,) = sample(logits, draw(sampling))
    assert drawn.token == 9
    assert drawn.logprobs is not None
    assert drawn.logprobs.chosen == pytest.approx(expected[9].item(), abs=1e-5)
    assert [token for token, _ in drawn.logprobs.top] == expected.topk(4).indices.tolist()
    logprobs = [logprob for _, logprob in drawn.logprobs.top]
    assert logprobs == pytest.approx(expected.topk(4).values.tolist(), abs=1e-5)


def test_logprobs_of_tied_tokens_come_in_the_order_of_tokens() -> None:
    (drawn,) = sample(torch.zeros(1, VOCAB), draw(Sampling(temperature=0.0, logprobs=3)))
    assert drawn.logprobs is not None
    assert [token for token, _ in drawn.logprobs.top] == [0, 1, 2]


def test_only_those_who_asked_get_logprobs() -> None:
    samplings = [Sampling(logprobs=0), Sampling(), Sampling(logprobs=400)]
    drawn = sample(random_logits(3), *[draw(sampling) for sampling in samplings])
    assert [None if d.logprobs is None else len(d.logprobs.top) for d in drawn] == [0, None, VOCAB]


def test_logits_that_are_not_numbers_name_the_request() -> None:
    logits = random_logits(3)
    logits[1, 100] = float("nan")
    with pytest.raises(BadLogits, match="r1"):
        sample(logits, *[draw(Sampling(temperature=0.0))] * 3)


def test_bf16_logits_are_sampled_as_fp32() -> None:
    logits = random_logits(4).bfloat16()
    drawn = sample(logits, *[draw(Sampling(seed=i)) for i in range(4)])
    assert tokens(drawn) == tokens(
        sample(logits.float(), *[draw(Sampling(seed=i)) for i in range(4)])
    )


def test_an_empty_batch_draws_nothing() -> None:
    assert sample(torch.empty(0, VOCAB)) == []
