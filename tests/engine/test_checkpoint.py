"""What a model directory says, and how a bad one is answered."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.checkpoint import _locate, open_checkpoint
from engine.errors import BadCheckpoint
from engine.runner import Runner
from tests.engine import tiny
from tests.engine.driving import Greedy, generate

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

BLOCKS = range(10)


@pytest.fixture
def directory(tiny_checkpoint: Callable[[str], Path], tmp_path: Path) -> Path:
    """A copy that a test may spoil."""
    return shutil.copytree(tiny_checkpoint("llama3"), tmp_path / "model")


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    model = tiny.make("llama3", tmp_path / "whole")
    model.save_pretrained(tmp_path / "sharded", max_shard_size="30KB")
    return tmp_path / "sharded"


def load(directory: Path) -> Runner:
    return Runner(open_checkpoint(str(directory)), sampler=Greedy(), blocks=12, block_tokens=4)


def refused(directory: Path) -> BadCheckpoint:
    with pytest.raises(BadCheckpoint) as caught:
        load(directory)
    return caught.value


def change_config(directory: Path, **changes: Any) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_a_sharded_checkpoint_is_the_same_model(sharded: Path) -> None:
    assert len(list(sharded.glob("*.safetensors"))) > 2
    check_same_model(sharded.parent / "whole", sharded)


def test_a_missing_shard_is_named(sharded: Path) -> None:
    lost = sorted(sharded.glob("*.safetensors"))[1]
    lost.unlink()
    assert refused(sharded).field == str(lost)


def test_a_truncated_shard_is_named(sharded: Path) -> None:
    cut = sorted(sharded.glob("*.safetensors"))[1]
    cut.write_bytes(cut.read_bytes()[:-100])
    error = refused(sharded)
    assert error.field == str(cut)
    assert error.value == cut.stat().st_size


def test_a_broken_index_is_named(sharded: Path) -> None:
    index = sharded / "model.safetensors.index.json"
    index.write_text("{}")
    assert refused(sharded).field == str(index)


def test_a_directory_without_weights_is_refused(directory: Path) -> None:
    (directory / "model.safetensors").unlink()
    assert "must hold model.safetensors" in str(refused(directory))


def test_a_tensor_of_the_wrong_shape_is_named(directory: Path) -> None:
    change_config(directory, intermediate_size=52)
    error = refused(directory)
    assert error.field == "model.layers.0.mlp.gate_proj.weight"
    assert error.value == [48, 32]
    assert error.rule == "must be of shape [52, 32]"


def test_a_missing_tensor_is_named(directory: Path) -> None:
    change_config(directory, num_hidden_layers=3)
    assert refused(directory).field == "model.layers.2.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"model_type": "mamba"}, "model_type"),
        ({"hidden_size": None}, "hidden_size"),
        ({"hidden_size": "32"}, "hidden_size"),
        ({"rms_norm_eps": -1}, "rms_norm_eps"),
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        ({"hidden_act": "mish"}, "hidden_act"),
        ({"dtype": "int4"}, "dtype"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantization_config: quant_method"),
        (
            {"quantization_config": {"quant_method": "compressed-tensors", "format": "int"}},
            "quantization_config: format",
        ),
        (
            {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128]}},
            "quantization_config: weight_block_size",
        ),
        ({"rope_parameters": {"rope_type": "mrope"}}, "rope_parameters: rope_type"),
        ({"rope_parameters": {"rope_type": "linear"}}, "rope_parameters: factor"),
        ({"rope_parameters": []}, "rope_parameters"),
    ],
)
def test_a_bad_field_of_the_config_is_named(
    change: dict[str, Any], field: str, directory: Path
) -> None:
    change_config(directory, **change)
    assert refused(directory).field == f"config.json: {field}"


def test_a_config_that_is_missing_or_not_json_is_named(directory: Path) -> None:
    config = directory / "config.json"
    config.write_text("{")
    assert refused(directory).field == str(config)
    config.unlink()
    assert refused(directory).field == str(config)


def test_a_directory_that_is_not_there_is_refused(tmp_path: Path) -> None:
    assert refused(tmp_path / "nothing").rule == "no such directory"


def test_a_hub_id_offline_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(BadCheckpoint, match="give a model directory"):
        open_checkpoint("somebody/some-model")


@pytest.mark.parametrize("lost", ["config.json", "tokenizer.json", "model-00002.safetensors"])
def test_a_hub_copy_on_this_machine_is_taken_without_asking_the_hub_if_it_is_whole(
    lost: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    cache = tmp_path / "models--somebody--some-model"
    copy = cache / "snapshots" / "abc"
    copy.mkdir(parents=True)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("abc")
    weights = {"a": "model-00001.safetensors", "b": "model-00002.safetensors"}
    for name in ("config.json", "tokenizer.json", *weights.values()):
        (copy / name).touch()
    (copy / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weights}))
    asked: list[bool] = []
    ask = huggingface_hub.snapshot_download

    def noting(source: str, *, local_files_only: bool = False, **options: Any) -> str:
        asked.append(not local_files_only)
        return str(ask(source, local_files_only=True, **options))

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.snapshot_download", noting)
    assert _locate("somebody/some-model") == copy
    assert asked == [False]
    (copy / lost).unlink()
    _locate("somebody/some-model")
    assert asked == [False, False, True]


def test_what_is_neither_a_directory_nor_a_hub_id_is_refused() -> None:
    with pytest.raises(BadCheckpoint, match="neither a directory nor a hub id"):
        open_checkpoint("not a/valid/id")


def rename_tensors(directory: Path, old: str, new: str) -> None:
    path = directory / "model.safetensors"
    tensors = load_file(path)
    save_file({name.replace(old, new, 1): tensor for name, tensor in tensors.items()}, path)


def test_the_text_half_of_a_multimodal_checkpoint_is_the_text_model(
    tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    text = tiny_checkpoint("gemma3")
    both = shutil.copytree(text, tmp_path / "both")
    config = json.loads((text / "config.json").read_text())
    nested = {"model_type": "gemma3", "text_config": config, "dtype": config["dtype"]}
    (both / "config.json").write_text(json.dumps(nested))
    rename_tensors(both, "model.", "language_model.model.")
    check_same_model(text, both)


def test_gpt2_may_be_stored_without_its_prefix(
    tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    prefixed = tiny_checkpoint("gpt2")
    bare = shutil.copytree(prefixed, tmp_path / "bare")
    rename_tensors(bare, "transformer.", "")
    check_same_model(prefixed, bare)


def check_same_model(one: Path, other: Path) -> None:
    first, second = (load(directory) for directory in (one, other))
    prompt = tiny.prompt(20)
    assert generate(first, prompt, 8, BLOCKS) == generate(second, prompt, 8, BLOCKS)
    assert first.layout == second.layout


def test_older_spelling_of_the_rope_means_the_same(directory: Path) -> None:
    newer = open_checkpoint(str(directory)).config
    rope = json.loads((directory / "config.json").read_text())["rope_parameters"]
    theta = rope.pop("rope_theta")
    change_config(directory, rope_parameters=None, rope_theta=theta, rope_scaling=rope)
    assert open_checkpoint(str(directory)).config == newer


def test_generation_config_says_which_tokens_end_an_answer(directory: Path) -> None:
    generation = directory / "generation_config.json"
    generation.write_text(json.dumps({"eos_token_id": [7, 9]}))
    assert open_checkpoint(str(directory)).eos_token_ids == {7, 9}
    generation.unlink()
    assert open_checkpoint(str(directory)).eos_token_ids == {2}


def test_the_served_length_may_be_capped_but_not_stretched(directory: Path) -> None:
    assert open_checkpoint(str(directory), longest=64).max_length == 64
    with pytest.raises(BadCheckpoint, match="longer than the model's"):
        open_checkpoint(str(directory), longest=129)


def test_the_fingerprint_tells_other_weights_and_other_shapes_apart(directory: Path) -> None:
    first = open_checkpoint(str(directory))
    assert open_checkpoint(str(directory), longest=64).fingerprint == first.fingerprint
    change_config(directory, rms_norm_eps=1e-5)
    assert open_checkpoint(str(directory)).fingerprint != first.fingerprint
    torch.manual_seed(5)
    model = tiny.make("llama3", directory, initializer_range=0.5)
    assert model is not None
    assert open_checkpoint(str(directory)).fingerprint != first.fingerprint


@pytest.mark.parametrize("longest", [16, 128])
def test_longrope_divides_by_the_set_of_the_longest_sequence_served(
    longest: int, tmp_path: Path
) -> None:
    reference = tiny.make("phi3", tmp_path)
    checkpoint = open_checkpoint(str(tmp_path), longest)
    runner = Runner(checkpoint, sampler=Greedy(), blocks=32, block_tokens=4)
    prompt = tiny.prompt(12 if longest == 16 else 20)
    wanted = reference.generate(
        torch.tensor([prompt]), max_new_tokens=4, do_sample=False, eos_token_id=None
    )
    assert generate(runner, prompt, 4, BLOCKS) == wanted[0, len(prompt) :].tolist()
