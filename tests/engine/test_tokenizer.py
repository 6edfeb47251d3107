"""Tokenizers read as Hugging Face reads them; chat templates in a sandbox; typed errors."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from engine.errors import BadCheckpoint, BadRequest
from engine.tokenizer import Tokenizer
from tests.engine.spellings import write_byte_level, write_sentencepiece

if TYPE_CHECKING:
    from pathlib import Path

SAMPLES = ["the fox", " leading", "café 東京 🦊", "two words", "a\n\n b\t", "", "ünder </s> x"]
CONFIGS: list[dict[str, Any]] = [
    {},
    {"add_bos_token": True},
    {"add_bos_token": False},
    {"add_bos_token": True, "add_eos_token": True},
    {"add_bos_token": True, "bos_token": None},
]
HELLO = [{"role": "user", "content": "hello"}]


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("write", [write_byte_level, write_sentencepiece])
def test_tokens_and_text_are_those_of_transformers(
    write: Any, config: dict[str, Any], tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    folder = write(tmp_path / "model", **config)
    ours, theirs = Tokenizer.open(folder), AutoTokenizer.from_pretrained(folder)
    for text in SAMPLES:
        ids = ours.encode(text)
        assert ids == theirs(text)["input_ids"], text
        for skip in (True, False):
            shown = ours.decode(ids, skip_special_tokens=skip)
            assert shown == theirs.decode(ids, skip_special_tokens=skip)
    assert ours.eos_id == theirs.eos_token_id
    assert ours.bos_id == theirs.bos_token_id


@pytest.mark.parametrize("write", [write_byte_level, write_sentencepiece])
def test_token_bytes_join_to_the_text(write: Any, tmp_path: Path) -> None:
    tokenizer = Tokenizer.open(write(tmp_path))
    for text in SAMPLES[:-1]:
        ids = tokenizer.encode(text, add_special_tokens=False)
        joined = b"".join(map(tokenizer.token_bytes, ids)).decode()
        assert joined in (text, f" {text}")


def test_ids_past_the_vocabulary_stand_for_nothing(tmp_path: Path) -> None:
    tokenizer = Tokenizer.open(write_byte_level(tmp_path))
    assert tokenizer.token_bytes(tokenizer.vocab_size + 5) == b""


def test_vocab_and_merges_alone_are_enough_for_older_byte_level_checkpoints(tmp_path: Path) -> None:
    folder = write_byte_level(tmp_path, add_bos_token=True)
    plain = Tokenizer.open(folder).encode("the fox, 東京</s>")
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
    lines = ["#version: 0.2", *(" ".join(pair) for pair in model["merges"])]
    (folder / "merges.txt").write_text("\n".join(lines))
    (folder / "tokenizer.json").unlink()
    older = Tokenizer.open(folder)
    assert older.encode("the fox, 東京</s>") == [older.bos_id, *plain]
    assert older.decode(older.encode("the fox, 東京")) == "the fox, 東京"


def test_every_end_named_by_the_checkpoint_is_an_end(tmp_path: Path) -> None:
    folder = write_byte_level(tmp_path)
    assert Tokenizer.open(folder).eos_ids == {1}
    (folder / "config.json").write_text('{"eos_token_id": 40}')
    assert Tokenizer.open(folder).eos_ids == {1, 40}
    (folder / "generation_config.json").write_text('{"eos_token_id": [50, 60]}')
    assert Tokenizer.open(folder).eos_ids == {1, 50, 60}


def test_a_tokenizer_that_knows_more_tokens_than_the_model_is_refused(tmp_path: Path) -> None:
    folder = write_byte_level(tmp_path)
    size = Tokenizer.open(folder).vocab_size
    assert Tokenizer.open(folder, embeddings=size).vocab_size == size
    with pytest.raises(BadCheckpoint, match=f"model's {size - 1} embeddings"):
        Tokenizer.open(folder, embeddings=size - 1)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", None, "missing"),
        ("tokenizer.json", b"{", "cannot be read"),
        ("tokenizer.json", b'{"model": 3}', "cannot be read"),
        ("tokenizer.json", b"\xff\xfe", "cannot be read"),
        ("tokenizer_config.json", b"[1]", "must hold a JSON object"),
        ("tokenizer_config.json", b"{oops", "cannot be read"),
        ("chat_template.jinja", b"{% if %}", "chat_template"),
        ("chat_template.jinja", b"\xff", "cannot be read"),
    ],
)
def test_a_broken_file_is_named(
    name: str, content: bytes | None, message: str, tmp_path: Path
) -> None:
    folder = write_byte_level(tmp_path)
    if content is None:
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(content)
    with pytest.raises(BadCheckpoint, match=message):
        Tokenizer.open(folder)


def test_a_decoder_of_another_kind_is_refused(tmp_path: Path) -> None:
    folder = write_byte_level(tmp_path)
    content = json.loads((folder / "tokenizer.json").read_text())
    content["decoder"] = {"type": "WordPiece", "prefix": "##", "cleanup": True}
    (folder / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(BadCheckpoint, match="decoder must be"):
        Tokenizer.open(folder)


def test_decoding_an_unknown_token_is_a_bad_request(tmp_path: Path) -> None:
    tokenizer = Tokenizer.open(write_byte_level(tmp_path))
    for token in (-1, tokenizer.vocab_size):
        with pytest.raises(BadRequest, match="must lie in"):
            tokenizer.decode([token])


TEMPLATE = """{{ bos_token }}{% for m in messages -%}
    {% if m.role == 'tool' %}{% continue %}{% endif -%}
    [{{ m.role }}] {{ m.content }}
{% endfor %}{% generation %}!{% endgeneration %}{{ tools | tojson }}
{%- if add_generation_prompt %}[assistant]{% endif %}"""


def test_a_template_gives_what_transformers_gives(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    folder = write_byte_level(tmp_path, chat_template=TEMPLATE)
    ours, theirs = Tokenizer.open(folder), AutoTokenizer.from_pretrained(folder)
    messages = [
        {"role": "system", "content": "be <brief>"},
        {"role": "tool", "content": "42"},
        {"role": "user", "content": "héllo"},
    ]
    tools = [{"type": "function", "function": {"name": "look<up>"}}]
    for prompt in (True, False):
        expected = theirs.apply_chat_template(
            messages, tools=tools, add_generation_prompt=prompt, tokenize=False
        )
        assert ours.render_chat(messages, tools, add_generation_prompt=prompt) == expected
        assert (
            ours.apply_chat(messages, tools, add_generation_prompt=prompt)
            == theirs(expected, add_special_tokens=False).input_ids
        )


def test_a_template_of_its_own_file_comes_first(tmp_path: Path) -> None:
    folder = write_byte_level(tmp_path, chat_template="config")
    assert Tokenizer.open(folder).render_chat(HELLO) == "config"
    (folder / "chat_template.jinja").write_text("file")
    assert Tokenizer.open(folder).render_chat(HELLO) == "file"


def test_of_several_templates_the_default_is_taken(tmp_path: Path) -> None:
    templates = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": "y"}]
    folder = write_byte_level(tmp_path, chat_template=templates)
    assert Tokenizer.open(folder).render_chat(HELLO) == "y"


def test_text_parts_are_joined_and_other_parts_refused(tmp_path: Path) -> None:
    tokenizer = Tokenizer.open(write_byte_level(tmp_path, chat_template=TEMPLATE))
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    assert "one\ntwo" in tokenizer.render_chat([{"role": "user", "content": parts}])
    image = [{"type": "image_url", "image_url": {"url": "x"}}]
    with pytest.raises(BadRequest, match=r"messages\[0\].content\[0\]"):
        tokenizer.render_chat([{"role": "user", "content": image}])
    with pytest.raises(BadRequest, match="must be text or a list"):
        tokenizer.render_chat([{"role": "user", "content": 3}])


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('roles must alternate') }}",
        "{{ messages[0].missing.deeper }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ 'a' + 1 }}",
        "{{ messages[9].role }}",
    ],
)
def test_what_a_template_refuses_is_the_callers_error(template: str, tmp_path: Path) -> None:
    tokenizer = Tokenizer.open(write_byte_level(tmp_path, chat_template=template))
    with pytest.raises(BadRequest, match="messages"):
        tokenizer.render_chat(HELLO)


def test_a_model_without_a_template_cannot_chat(tmp_path: Path) -> None:
    tokenizer = Tokenizer.open(write_byte_level(tmp_path))
    assert not tokenizer.has_chat_template
    with pytest.raises(BadRequest, match="no chat template"):
        tokenizer.apply_chat(HELLO)


def test_templates_may_ask_for_the_date(tmp_path: Path) -> None:
    template = "{{ strftime_now('%Y') }}"
    folder = write_byte_level(tmp_path, chat_template=template)
    assert int(Tokenizer.open(folder).render_chat(HELLO)) >= 2025
