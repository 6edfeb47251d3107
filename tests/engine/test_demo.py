"""The built-in model is small, whole, and writes what a person can read."""

from __future__ import annotations

import importlib
import importlib.util
import json
import re
import sys
from importlib.machinery import SourceFileLoader
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

import engine
from engine.batch import Batch
from engine.checkpoint import open_checkpoint
from engine.errors import BadRequest
from engine.runner import Runner
from engine.tokenizer import Tokenizer
from tests.engine.driving import Greedy, chunk

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import ModuleType

DEMO = Path(engine.__file__).parent / "demo"
SCRIPTS = Path(engine.__file__).parent.parent / "scripts"
TOKENIZER = Tokenizer.open(DEMO)
CONFIG = json.loads((DEMO / "config.json").read_text())
BLOCKS = range(256)


@pytest.fixture(scope="module")
def corpus() -> ModuleType:
    sys.path.insert(0, str(SCRIPTS))
    corpus = importlib.import_module("demo_corpus")

    sys.path.remove(str(SCRIPTS))
    return corpus


@pytest.fixture(scope="module")
def runner() -> Runner:
    return Runner(open_checkpoint("demo"), sampler=Greedy(), blocks=len(BLOCKS), block_tokens=16)


def complete(runner: Runner, prompt: Sequence[int], most: int, seed: int | None = None) -> str:
    """Up to the end of the text; greedy, or drawn at temperature 1 by a seed."""
    random = torch.Generator().manual_seed(seed or 0)
    tokens, computed = list(prompt), 0
    while len(tokens) < len(prompt) + most:
        logits = runner.logits(Batch((chunk("a", tokens[computed:], computed, BLOCKS),)))
        assert logits is not None
        computed, likely = len(tokens), logits[0].softmax(-1)
        drawn = likely.argmax() if seed is None else torch.multinomial(likely, 1, generator=random)
        if int(drawn) in TOKENIZER.eos_ids:
            return TOKENIZER.decode(tokens[len(prompt) :])
        tokens.append(int(drawn))
    pytest.fail("does not end: " + TOKENIZER.decode(tokens))


def ask(runner: Runner, *turns: str, seed: int | None = None) -> str:
    """What it says after turns of the user and the assistant."""
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": turn} for i, turn in enumerate(turns)]
    return complete(runner, TOKENIZER.apply_chat(messages), 400, seed)


def test_the_package_stays_under_twelve_megabytes() -> None:
    assert sum(path.stat().st_size for path in DEMO.iterdir()) < 12e6


def test_the_weights_are_two_to_eight_million_of_a_llama_that_runs_in_fp32() -> None:
    tensors = load_file(DEMO / "model.safetensors").values()
    parameters = sum(tensor.numel() for tensor in tensors)
    assert 2e6 <= parameters <= 8e6
    assert (CONFIG["model_type"], CONFIG["dtype"]) == ("llama", "float32")


def test_the_tokenizer_fits_the_model_and_its_ends_are_the_models() -> None:
    assert Tokenizer.open(DEMO, embeddings=CONFIG["vocab_size"]).vocab_size <= CONFIG["vocab_size"]
    assert TOKENIZER.eos_ids == {CONFIG["eos_token_id"]}
    assert TOKENIZER.bos_id == CONFIG["bos_token_id"]


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=60))
def test_any_text_encodes_and_comes_back(text: str) -> None:
    ids = TOKENIZER.encode(text)
    assert ids[0] == TOKENIZER.bos_id
    if "<|" not in text:
        assert TOKENIZER.decode(ids) == text


def test_a_digit_is_a_token() -> None:
    ids = TOKENIZER.encode("12345", add_special_tokens=False)
    assert [TOKENIZER.token_text(token) for token in ids] == list("12345")


def test_a_chat_ends_where_the_assistant_begins() -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": " Hi! "}]
    expected = "<|begin|><|system|>Be brief.<|end|><|user|>Hi!<|end|>"
    assert TOKENIZER.render_chat(messages) == expected + "<|assistant|>"
    assert TOKENIZER.render_chat(messages, add_generation_prompt=False) == expected
    assert TOKENIZER.apply_chat(messages)[0] == TOKENIZER.bos_id


def test_tools_and_unknown_roles_are_refused() -> None:
    with pytest.raises(BadRequest, match="does not call tools"):
        TOKENIZER.apply_chat([{"role": "user", "content": "Hi"}], tools=[{"type": "function"}])
    with pytest.raises(BadRequest, match="role must be"):
        TOKENIZER.apply_chat([{"role": "wizard", "content": "Hi"}])


@pytest.mark.parametrize(
    ("question", "answer"),
    [
        ("Hello", "Hello!"),
        ("Who are you?", "small language model"),
        ("What is Tandem?", "language models"),
        ("What is the capital of France?", "Paris"),
        ("Count from 1 to 20.", ", ".join(map(str, range(1, 21))) + "."),
        ("Count to 10", ", ".join(map(str, range(1, 11))) + "."),
        ("What is 3 times 4?", "I can only add and subtract."),
        ("Write a Python function", "a story or a sum"),
    ],
)
def test_it_answers_what_a_newcomer_asks(runner: Runner, question: str, answer: str) -> None:
    assert answer in ask(runner, question)


@pytest.mark.parametrize("a", range(1, 10))
def test_it_adds_and_subtracts_digits(runner: Runner, a: int) -> None:
    for b in range(1, 10):
        assert ask(runner, f"What is {a} plus {b}?") == f"{a} + {b} = {a + b}"
        assert ask(runner, f"{a + b} - {b}") == f"{a + b} - {b} = {a}"


def test_it_knows_what_was_said_before(runner: Runner) -> None:
    hello = ask(runner, "My name is Tom.")
    assert "Tom" in hello
    assert "Tom" in ask(runner, "My name is Tom.", hello, "What is my name?")
    story = ask(runner, "Tell me a story")
    assert ask(runner, "Tell me a story", story, "Thank you!") == "You are welcome."
    assert ask(runner, "Tell me a story", story, "What is 7 plus 5?") == "7 + 5 = 12"


def words_of(text: str) -> list[str]:
    return re.findall(r"[A-Za-z]+", text)


@pytest.fixture(scope="module")
def known(corpus: ModuleType) -> set[str]:
    return set(words_of(" ".join(corpus.documents(1, 3000))))


@pytest.mark.parametrize("seed", [None, 1, 2, 3])
@pytest.mark.parametrize("prompt", ["Tell me a story", "Once upon a time"])
def test_a_story_is_made_of_known_words_and_sentences_told_once(
    runner: Runner, known: set[str], prompt: str, seed: int | None
) -> None:
    if prompt.startswith("Tell"):
        story = ask(runner, prompt, seed=seed)
    else:
        story = complete(runner, TOKENIZER.encode(prompt), 400, seed)
    words, sentences = words_of(story), re.split(r"(?<=[.!?])\s+", story)
    assert len(words) > 60
    assert set(words) <= known
    assert len(set(sentences)) == len(sentences)
    assert story.rstrip()[-1] in '.!"'


def test_a_story_keeps_to_the_hero_it_was_asked_for(runner: Runner) -> None:
    story = ask(runner, "Tell me a story about a fox named Zoe.")
    assert "fox named Zoe" in story
    assert story.count("Zoe") >= 4


def test_a_long_context_does_not_make_it_babble(runner: Runner, corpus: ModuleType) -> None:
    past = "".join(corpus.documents(5, 40))
    before = TOKENIZER.encode(past, add_special_tokens=False)[-3000:]
    question = TOKENIZER.apply_chat([{"role": "user", "content": "Who are you?"}])
    assert "small language model" in complete(runner, [*before, *question], 100)


def test_the_corpus_is_the_same_for_the_same_seed(corpus: ModuleType) -> None:
    assert list(corpus.documents(3, 50)) == list(corpus.documents(3, 50))
    assert list(corpus.documents(3, 50)) != list(corpus.documents(4, 50))


def test_a_model_about_to_be_trained_already_repeats_random_text() -> None:
    loader = SourceFileLoader("train_demo", str(SCRIPTS / "train_demo"))
    spec = importlib.util.spec_from_loader(loader.name, loader)
    assert spec is not None
    script = importlib.util.module_from_spec(spec)
    loader.exec_module(script)
    torch.manual_seed(0)
    model = script.new_model(TOKENIZER.backend)
    said = torch.cat([tokens for tokens, _ in script.repeats(16)])
    half = said.shape[1] // 2
    with torch.inference_mode():
        likely = model(input_ids=said).logits.argmax(-1)
    assert (likely[:, half:-1] == said[:, half + 1 :]).float().mean() > 0.75
