from itertools import pairwise
from pathlib import Path

import pytest

from cluster.config import Config, load_config, parse_config
from cluster.config_docs import config_page
from cluster.settings import instance_settings
from engine.errors import BadConfig
from engine.messages import Role


def refused(values, match):
    with pytest.raises(BadConfig, match=match) as caught:
        parse_config(values)
    assert "\n" not in str(caught.value)


def test_nothing_given_serves_the_built_in_model_on_one_prefill_and_one_decode_instance():
    config = load_config()
    assert config.model == "demo"
    assert [config.pools.of(role).instances for role in Role] == [1, 1, 0]
    assert config.gateway.host == "127.0.0.1"


def test_a_model_name_or_directory_is_enough():
    assert load_config("org/model").model == "org/model"
    assert load_config("org/model").served_name == "model"


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"modle": "x"}, "^modle: 'modle': unknown; did you mean 'model'"),
        ({"pools": {"prefil": {}}}, "^pools.prefil: .*did you mean 'prefill'"),
        ({"pools": {"decode": {"instance": 2}}}, "^pools.decode.instance: .*'instances'"),
        ({"transfer": {"leases_s": 1.0}}, "^transfer.leases_s: .*did you mean 'lease_s'"),
        ({"transfer": {"copies": {"slice": 1}}}, "^transfer.copies.slice: "),
        ({"gateway": {"tls": {"cert": "x"}}}, "^gateway.tls.cert: .*unknown"),
        ({"engine": {"decode": {"host_slots": 8}}}, "^engine.decode.host_slots: .*unknown"),
    ],
)
def test_an_unknown_key_is_refused_with_its_path_and_the_nearest_name(values, match):
    refused(values, match)


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"pools": {"prefill": {"instances": -1}}}, "^pools.prefill.instances: -1: "),
        ({"pools": {"prefill": {"instances": True}}}, "^pools.prefill.instances: True: "),
        ({"pools": {"decode": {"instances": 0}}}, "^pools: .*needs a prefill and a decode"),
        ({"device": "tpu"}, "^device: 'tpu': "),
        ({"slo": {"ttft_s": 0}}, "^slo.ttft_s: 0: "),
        ({"transfer": {"lease_s": -1}}, "transfer.lease_s is -1"),
        (
            {"transfer": {"checksums": True, "compression": "int8"}},
            "transfer.checksums needs transfer.compression to be off",
        ),
        (
            {"engine": {"kv_dtype": "float8_e4m3fn"}, "device": "cpu"},
            "engine.kv_dtype must be auto where device is cpu",
        ),
        (
            {"engine": {"kv_dtype": "float8_e4m3fn"}, "transfer": {"compression": "int8"}},
            "engine.kv_dtype must be auto where transfer.compression codes KV",
        ),
        ({"gateway": {"http_port": 70000}}, "^gateway.http_port: 70000: "),
        ({"gateway": None}, "^gateway: None: "),
        ({"engine": {"dtype": "int8"}}, "^engine.dtype: 'int8': "),
        ({"engine": {"prefill": {"policy": "foo"}}}, "^engine.prefill.policy: 'foo': .*'fcfs'"),
    ],
)
def test_a_bad_value_is_refused_with_its_path_and_the_rule(values, match):
    refused(values, match)


def write(tmp_path: Path, text: str) -> str:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    return str(path)


def test_a_config_file_sets_what_it_names_and_flags_win(tmp_path):
    source = write(tmp_path, "model: m\npools:\n  decode: {instances: 3, tensor_parallel: 2}\n")
    config = load_config(source, **{"pools.decode.instances": 2, "gateway.http_port": 0})
    assert config.model == "m"
    assert config.pools.decode.instances == 2
    assert config.pools.decode.workers == 2
    assert config.gateway.http_port == 0


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("model: a\nmodel: b\n", "^line 2: 'model': this key is given twice"),
        ("model: [a\n", "not YAML"),
        ("- model\n", "must hold a mapping"),
    ],
)
def test_a_broken_file_is_refused_with_the_line(tmp_path, text, match):
    with pytest.raises(BadConfig, match=match):
        load_config(write(tmp_path, text))


def test_a_missing_file_is_named():
    with pytest.raises(BadConfig, match=r"absent\.yaml"):
        load_config("absent.yaml")


def test_a_plan_is_a_config(tmp_path):
    plan = """
    model: demo
    slo: {ttft_s: 0.5, tpot_s: 0.05, attainment: 0.9}
    hardware: {name: cpu}
    pools:
      - {role: prefill, instances: 2, tensor_parallel: 1, pipeline_parallel: 1, device: cpu}
      - {role: decode, instances: 1, tensor_parallel: 2, pipeline_parallel: 1, device: cpu}
    predicted: {goodput_rps: 3.0}
    reason: tight TTFT
    """
    config = load_config(write(tmp_path, plan))
    assert config.device == "cpu"
    assert config.pools.prefill.instances == 2
    assert config.pools.decode.tensor_parallel == 2
    assert config.slo.ttft_s == 0.5


def test_a_plan_with_an_unknown_role_is_refused(tmp_path):
    with pytest.raises(BadConfig, match=r"pools\[0\]\.role"):
        load_config(write(tmp_path, "pools: [{role: both}]\n"))


def test_a_config_survives_its_own_json():
    config = load_config()
    assert Config.model_validate_json(config.model_dump_json()) == config


@pytest.mark.parametrize(
    "path", sorted(Path("cluster/configs").glob("*.yaml")), ids=lambda path: path.stem
)
def test_every_shipped_config_is_valid(path):
    if "policy" not in path.name:
        load_config(str(path))


def test_an_instances_decode_scheduler_swaps_to_the_slots_that_its_engine_has():
    config = load_config(None, **{"engine.host_slots": 8, "engine.decode.max_sequences": 4})
    decode = instance_settings(config).role.decode
    assert (decode.host_slots, decode.max_sequences) == (8, 4)


def test_every_row_of_the_reference_page_is_one_line():
    tables = [line for line in config_page().splitlines() if line.startswith("|")]
    assert len(tables) > 100
    assert all(line.count(" | ") >= 3 and line.endswith("|") for line in tables if "`" in line)
    after_rows = [b for a, b in pairwise(config_page().splitlines()) if a.startswith("| `")]
    assert all(line.startswith("|") or not line for line in after_rows)


def test_the_doors_limits_are_keys_of_the_config():
    config = load_config(None, **{"gateway.http": {"body_bytes": 10}, "gateway.grpc": {}})
    assert config.gateway.http.body_bytes == 10
    with pytest.raises(BadConfig, match=r"gateway.http.body_byte.*did you mean 'body_bytes'"):
        load_config(None, **{"gateway.http": {"body_byte": 10}})
