"""Planning from the command line: what is written, what is shown, and what is refused."""

import json
import re
from html import escape

import numpy as np
import pytest
import yaml

from cluster.cli.app import run
from cluster.cli.planning import (
    as_configured,
    config_of,
    cost_book,
    dynamics_of,
    find_shape,
    not_simulated,
    read_plan_file,
)
from cluster.config import Config, load_config
from cluster.control.pools import LOCAL_WORKER_CPU, Ground, initial_specs
from cluster.plan_file import A_LITTLE
from cluster.profiling.measure import Device, Measuring, measure
from cluster.profiling.passes import Pass, passes_of, profile_entry
from cluster.settings import instance_settings
from engine.checkpoint import open_checkpoint
from engine.errors import BadConfig, Unsupported
from engine.messages import Role
from placement.latency.catalog import find_device
from placement.latency.measured import Measured
from placement.latency.model import mixed_step
from placement.latency.profile_file import profile_from
from placement.planning.candidate import deployment_for
from placement.planning.costbook import Cut
from placement.planning.plan_keys import CONFIG_KEYS, PLAN_KEYS
from placement.simulation import simulator
from placement.simulation.simulator import Simulation

PASSES = [
    {"tokens": 16, "squares": 256, "seconds": 0.004},
    {"tokens": 256, "squares": 65536, "seconds": 0.02},
    {"tokens": 1024, "squares": 1048576, "seconds": 0.1},
]
DECODES = [
    {"batch": 1, "context": 100, "seconds": 0.002},
    {"batch": 16, "context": 1600, "seconds": 0.004},
    {"batch": 64, "context": 20000, "seconds": 0.012},
]
STILL = {"count": 1, "tokens": 1, "draws": 1, "pairs": 0, "kv_read_tokens": 9, "processor_s": 0}
CONTRACT_FIELDS = {
    "requests", "finished", "failed", "duration_s", "rate_rps", "throughput_tokens_s",
    "attainment", "goodput_rps", "ttft_s", "tpot_s", "itl_s", "e2e_s", "ttft_parts_s",
}  # fmt: skip

SPLIT_PLAN = {
    "model": "demo",
    "slo": {"ttft_s": 1.0, "tpot_s": 0.1},
    "hardware": {"nodes": [{"device": "cpu-core"}]},
    "pools": [{"role": "prefill"}, {"role": "decode"}],
}


@pytest.fixture
def tandem(capsys):
    def command(*arguments):
        status = run([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return command


@pytest.fixture
def files(tmp_path):
    """Fleets of one and of two cores, thirty small requests, and the built-in model's profile."""
    generator = np.random.default_rng(0)
    arrivals = np.cumsum(generator.exponential(0.5, 30))
    rows = [
        f"{arrival:.3f},{generator.integers(16, 128)},{generator.integers(2, 16)}"
        for arrival in arrivals
    ]
    write(tmp_path / "fleet.yaml", "nodes: [{device: cpu-core, devices: 1}]")
    write(tmp_path / "two.yaml", "nodes: [{device: cpu-core, devices: 2}]")
    write(tmp_path / "load.csv", "\n".join(["arrival_s,prompt_tokens,output_tokens", *rows]))
    write(tmp_path / "profile.json", json.dumps(profile_document("demo")))
    return tmp_path


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return path


def profile_document(model, device="cpu-core"):
    run = {"kv_capacity_tokens": 50_000, "prefill": PASSES, "decode": DECODES}
    transfer = [{"bytes": size, "seconds": 1e-4 + size / 4e9} for size in (1e5, 1e6, 1e7)]
    return {"model": model, "device": device, "runs": [run], "transfer": transfer}


def plan_arguments(files, **changed):
    options = {
        "model": "demo",
        "hardware": files / "fleet.yaml",
        "workload": files / "load.csv",
        "profile": files / "profile.json",
        "ttft": 0.5,
        "tpot": 0.05,
        "requests": 50,
        "processes": 1,
        "output": files / "plan.yaml",
        **changed,
    }
    return ["plan", *(f"--{name}={value}" for name, value in options.items() if value is not None)]


def refused(answer, field):
    status, out, err = answer
    lines = [line for line in err.splitlines() if line.startswith("tandem:")]
    assert (status, out) == (2, "")
    assert len(lines) == 1
    assert field in lines[0]


def test_a_plan_is_written_shown_and_deployable(tandem, files):
    status, out, err = tandem(*plan_arguments(files, hardware=files / "two.yaml"))
    assert status == 0
    assert "per accelerator" in out
    assert "limited by" in out
    assert "simulating candidates" in err
    written = yaml.safe_load((files / "plan.yaml").read_text())
    assert written["model"] == "demo"
    assert written["hardware"]["profile"] == str(files / "profile.json")
    assert set(written["predicted"]) >= CONTRACT_FIELDS
    config = load_config(str(files / "plan.yaml"))
    deployed = {pool["role"]: pool["instances"] for pool in written["pools"]}
    for role in ("prefill", "decode", "mixed"):
        assert getattr(config.pools, role).instances == deployed.get(role, 0)


def test_a_plan_deploys_the_engine_that_was_profiled(tandem, files):
    said = {"dtype": "bfloat16", "kv_dtype": "bfloat16", "threads": 2, "kv_bytes_per_token": 1}
    write(files / "profile.json", json.dumps(profile_document("demo") | said))
    status, _, _ = tandem(*plan_arguments(files, hardware=files / "two.yaml"))
    assert status == 0
    engine = load_config(str(files / "plan.yaml")).engine
    assert (engine.dtype, engine.kv_dtype, engine.threads) == ("bfloat16", "auto", 2)
    planned = read_plan_file(files / "plan.yaml")
    assert planned.engine["prefill"]["token_budget"] == engine.prefill.token_budget
    assert yaml.safe_load(planned.to_yaml())["engine"] == planned.engine


@pytest.mark.parametrize("threads", [1, 2])
def test_a_worker_takes_a_core_for_each_of_its_threads(tandem, files, threads):
    profile = json.dumps(profile_document("demo") | {"threads": threads})
    write(files / "profile.json", profile)
    four = write(files / "four.yaml", "nodes: [{device: cpu-core, devices: 4}]")
    status, out, _ = tandem(*plan_arguments(files, hardware=four), "--json")
    plan = json.loads(out)
    cores = threads * sum(one["instances"] * one["tensor_parallel"] for one in plan["pools"])
    predicted = plan["predicted"]
    assert (status, cores) == (0, 4)
    price = find_device("cpu-core").price_per_hour
    assert predicted["cost_per_hour"] == pytest.approx(cores * price)
    each = pytest.approx(predicted["goodput_rps"] / cores, rel=1e-4)
    assert predicted["goodput_rps_per_gpu"] == each


def test_a_worker_of_more_threads_than_a_node_has_cores_has_no_place(tandem, files):
    write(files / "profile.json", json.dumps(profile_document("demo") | {"threads": 2}))
    refused(tandem(*plan_arguments(files)), "threads: 2")
    hardware = {"nodes": [{"device": "cpu-core", "devices": 3}]}
    plan = {**SPLIT_PLAN, "hardware": hardware, "engine": {"threads": 2}}
    path = write(files / "own.yaml", yaml.safe_dump(plan))
    answer = tandem("simulate", "--plan", path, "--workload", files / "load.csv")
    refused(answer, "take 4 of cpu-core, of 3")


def test_narrow_kv_is_planned_and_deployed_as_it_was_profiled(tandem, files):
    wide = profile_document("llama-3.1-8b", "l4") | {"dtype": "float16", "kv_dtype": "float16"}
    write(files / "wide.json", json.dumps(wide))
    write(files / "narrow.json", json.dumps(wide | {"kv_dtype": "float8_e4m3fn"}))
    fleet = write(files / "l4.yaml", "nodes: [{device: l4, devices: 1}]")
    asked = {"model": "llama-3.1-8b", "hardware": fleet, "profile": files / "narrow.json"}
    status, _, _ = tandem(*plan_arguments(files, **asked))
    assert status == 0
    engine = load_config(str(files / "plan.yaml")).engine
    assert (engine.dtype, engine.kv_dtype) == ("float16", "float8_e4m3fn")
    by_dtype = [
        cost_book("llama-3.1-8b", yaml.safe_load(fleet.read_text()) | {"profile": str(path)})
        for path in (files / "narrow.json", files / "wide.json")
    ]
    narrow, full = (book.shape.kv_bytes_per_token for book in by_dtype)
    assert 2 * narrow == full
    simulated = deployment_for(read_plan_file(files / "plan.yaml"), by_dtype[0])
    assert simulated.kv_bytes_per_token == narrow


def test_the_plan_as_json_is_the_file(tandem, files):
    arguments = plan_arguments(files, objective="accelerators", rate=1.0)
    status, out, _ = tandem(*arguments, "--json")
    assert status == 0
    assert json.loads(out) == yaml.safe_load((files / "plan.yaml").read_text())


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ({"objective": "goodput"}, "serves"),
        ({"objective": "goodput-per-accelerator"}, "per accelerator"),
        ({"objective": "accelerators", "rate": 1.0}, "takes 1 of the accelerators"),
        ({"objective": "cost", "rate": 1.0}, "an hour"),
        ({"objective": "power", "rate": 1.0}, " W"),
        ({"power-cap": 1000.0}, "serves"),
    ],
)
def test_every_objective_can_be_asked_for_and_is_explained_in_its_terms(tandem, files, asked, says):
    status, out, _ = tandem(*plan_arguments(files, hardware=files / "two.yaml", **asked), "--json")
    answer = json.loads(out)
    assert status == 0
    assert says in answer["reason"]
    assert answer["alternatives"]
    assert answer["predicted"]["power_w"] <= asked.get("power-cap", float("inf"))


def test_targets_beyond_any_time_are_targets(tandem, files):
    status, _, _ = tandem(*plan_arguments(files, ttft=1e308, tpot=1e300))
    assert status == 0


def test_machines_that_cost_nothing_are_planned_for_a_rate(tandem, files):
    text = "nodes: [{device: cpu-core, devices: 2, price_per_hour: 0}]"
    free = write(files / "free.yaml", text)
    asked = {"objective": "cost", "rate": 1.0, "hardware": free}
    status, out, _ = tandem(*plan_arguments(files, **asked), "--json")
    answer = json.loads(out)
    assert status == 0
    assert answer["predicted"]["cost_per_hour"] == 0
    assert "It is as good as the best" in answer["reason"]


def served_as(files, *pools, fleet=()):
    nodes = [one if isinstance(one, dict) else {"device": one} for one in fleet]
    hardware = {"nodes": nodes}
    plan = {**SPLIT_PLAN, "hardware": hardware, "pools": list(pools)}
    path = write(files / "mix.yaml", yaml.safe_dump(plan))
    return initial_specs(load_config(str(path)), Ground("cuda", owned=True))


def test_every_pool_of_a_mix_is_served_on_its_own_devices(files):
    specs = served_as(
        files,
        {"role": "mixed", "device": "l4", "instances": 2},
        {"role": "mixed", "device": "h100-80gb", "tensor_parallel": 4},
        {"role": "prefill", "device": "h100-80gb"},
    )
    found = [(spec.name, spec.tensor_parallel, dict(spec.resources)) for spec in specs]
    share = {"CPU": LOCAL_WORKER_CPU, "GPU": 1.0}
    h100, l4 = ({**share, f"accelerator_type:{name}": A_LITTLE} for name in ("H100", "L4"))
    assert found == [
        ("prefill-0", 1, h100),
        ("mixed-0", 1, l4),
        ("mixed-1", 1, l4),
        ("mixed-2", 4, h100),
    ]


def test_a_pool_keeps_off_devices_that_its_plan_leaves_idle(files):
    (spec,) = served_as(files, {"role": "mixed", "device": "l4"}, fleet=["l4", "h100-80gb"])
    assert dict(spec.resources)["accelerator_type:L4"] == A_LITTLE


@pytest.mark.parametrize("pool", [{"device": "cpu-core"}, {}])
def test_a_pool_on_no_kind_of_gpu_goes_wherever_there_is_room(files, pool):
    (spec,) = served_as(files, {"role": "mixed", **pool}, fleet=["l4", "h100-80gb"])
    assert not any(name.startswith("accelerator") for name, _ in spec.resources)


def test_pools_on_one_kind_of_device_go_wherever_that_is(files):
    shapes = ({"tensor_parallel": 2}, {"tensor_parallel": 1})
    pools = [{"role": "mixed", "device": "l4", **shape} for shape in shapes]
    specs = served_as(files, *pools, fleet=["l4", "cpu-core"])
    assert [spec.tensor_parallel for spec in specs] == [2, 1]
    assert not any(name.startswith("accelerator") for spec in specs for name, _ in spec.resources)


def test_a_pools_own_resources_say_where_it_goes(files):
    pools = [{"role": "mixed", "device": f"a100-{size}gb"} for size in (40, 80)]
    given = [{**pool, "resources": {pool["device"]: 1.0}} for pool in pools]
    assert [
        dict(spec.resources)[pool["device"]]
        for spec, pool in zip(served_as(files, *given), pools, strict=True)
    ] == [1.0, 1.0]


@pytest.mark.parametrize(
    ("devices", "field"),
    [
        (("a100-40gb", "a100-80gb"), r"pools\[0\].resources: 'a100-40gb'"),
        (("h100-80gb", "abacus"), r"pools\[1\].resources: 'abacus'"),
    ],
)
def test_devices_that_ray_cannot_tell_apart_are_not_mixed_up(files, devices, field):
    with pytest.raises(BadConfig, match=field):
        served_as(files, *({"role": "mixed", "device": device} for device in devices))


def test_a_pool_goes_to_the_node_that_it_names(files):
    (spec,) = served_as(files, {"role": "mixed", "nodes": ["10.0.0.7"]})
    assert dict(spec.resources)["node:10.0.0.7"] == A_LITTLE


CAPPED = {"device": "h100-80gb", "power_cap_w": 350}


def test_capped_devices_are_told_from_others_by_resources_alone(files):
    fleet = ["h100-80gb", CAPPED]
    capped = {"role": "mixed", "device": "h100-80gb@350W"}
    for pool in (capped, {**capped, "device": "h100-80gb"}):
        with pytest.raises(BadConfig, match=r"pools\[0\].resources: 'h100-80gb"):
            served_as(files, pool, fleet=fleet)
    (spec,) = served_as(files, {**capped, "resources": {"slow": 1.0}}, fleet=fleet)
    assert dict(spec.resources)["slow"] == 1.0
    (anywhere,) = served_as(files, {**capped, "device": "h100-80gb"}, fleet=[CAPPED])
    assert "accelerator_type:H100" not in dict(anywhere.resources)


def test_a_device_in_nodes_of_two_sizes_is_one_to_ray(files):
    fleet = ["h100-80gb", {"device": "h100-80gb", "devices": 4}, "l4"]
    pools = [{"role": "mixed", "device": f"h100-80gb{size}"} for size in ("", "/devices=4")]
    for spec in served_as(files, *pools, fleet=fleet):
        assert dict(spec.resources)["accelerator_type:H100"] == A_LITTLE


@pytest.mark.parametrize("role", [None, "both", ["mixed"], {"mixed": 1}])
def test_a_pool_of_no_role_is_refused(files, role):
    with pytest.raises(BadConfig, match=r"pools\[0\].role"):
        served_as(files, {"role": role})


@pytest.mark.parametrize("nodes", ["10.0.0.7", ["10.0.0.7", "10.0.0.8"]])
def test_a_pool_on_any_of_several_nodes_is_refused(files, nodes):
    with pytest.raises(BadConfig, match=r"pools\[0\].nodes"):
        served_as(files, {"role": "mixed", "nodes": nodes})


def test_processors_and_accelerators_do_not_serve_together(files):
    pools = [
        {"role": "mixed", "device": name, "resources": {"x": 1}} for name in ("l4", "cpu-core")
    ]
    with pytest.raises(BadConfig, match="CPUs and GPUs"):
        served_as(files, *pools)


def test_a_plan_is_simulated_with_the_settings_that_it_is_served_with(files):
    engine = {"block_tokens": 32, "cache_prefixes": False, "host_slots": 9, "tpot_share": 0.5}
    own = {
        **SPLIT_PLAN,
        "engine": {**engine, "prefill": {"max_sequences": 7}, "decode": {"max_sequences": 3}},
        "gateway": {"routing": {"policy": "round_robin"}, "admission": {"patience": 3.0}},
        "transfer": {"layer_groups": 2, "max_rounds": 3},
    }
    for plan in (SPLIT_PLAN, own):
        same_settings(write(files / "own.yaml", yaml.safe_dump(plan)))


def same_settings(path):
    served, planned = load_config(str(path)), read_plan_file(path)
    simulated = as_configured(
        deployment_for(planned, cost_book("demo", planned.hardware)), config_of(path)
    )
    assert not_simulated(path) == []
    assert simulated.block_tokens == served.engine.block_tokens
    assert simulated.cache_prefixes == served.engine.cache_prefixes
    assert simulated.router == served.gateway.routing
    assert simulated.overheads.layer_groups == served.transfer.layer_groups
    dynamics = dynamics_of(config_of(path), admission=True)
    assert dynamics.admission == served.gateway.admission
    assert dynamics.most_rounds == served.transfer.max_rounds
    roles = {instance.settings for instance in simulated.instances}
    assert roles == {instance_settings(served).role}


def test_a_plan_may_hold_whatever_serve_takes_beside_it(tandem, files):
    assert not set(PLAN_KEYS) & set(CONFIG_KEYS)
    assert set(Config.model_fields) <= {*PLAN_KEYS, *CONFIG_KEYS}
    own = {
        **SPLIT_PLAN,
        "gateway": {"admission": {"live_requests": 1}, "http_port": 9},
        "device": "cpu",
    }
    plan = write(files / "own.yaml", yaml.safe_dump(own))
    simulate = ("simulate", "--plan", plan, "--workload", files / "load.csv")
    status, out, err = tandem(*simulate, "--admission", "--json")
    assert status == 0
    assert json.loads(out)["refused"] > 0
    assert err == "not simulated: gateway.http_port\n"


def test_simulating_a_plan_gives_the_fields_of_bench(tandem, files):
    plan = write(files / "own.yaml", yaml.safe_dump(SPLIT_PLAN))
    simulate = ("simulate", "--plan", plan, "--workload", files / "load.csv")
    status, out, _ = tandem(*simulate, "--rate", 4, "--json")
    figures = json.loads(out)
    assert status == 0
    assert set(figures) >= CONTRACT_FIELDS
    assert figures["finished"] == figures["requests"] == 30
    assert figures["rate_rps"] == pytest.approx(4)
    assert figures["ttft_parts_s"]["transfer"] > 0
    status, out, err = tandem(*simulate, "--profile", files / "profile.json")
    assert (status, err) == (0, "")
    assert "within targets" in out


def test_plans_and_simulations_draw_reports_that_fetch_nothing(tandem, files):
    page = files / "report.html"
    arguments = plan_arguments(files, hardware=files / "two.yaml", report=page)
    status, _, err = tandem(*arguments)
    assert (status, "drawing the report" in err) == (0, True)
    drawn = page.read_text()
    reason = yaml.safe_load((files / "plan.yaml").read_text())["reason"]
    for title in ("Attainment over rate", "TTFT against TPOT", "Utilisation over time"):
        assert title in drawn
    assert escape(reason) in drawn
    given = ("--plan", files / "plan.yaml", "--workload", files / "load.csv")
    status, _, _ = tandem("simulate", *given, "--report", page)
    simulated = page.read_text()
    assert status == 0
    for text in (drawn, simulated):
        assert text.count("<svg") == 7
        assert not re.search(r"""(src|href)=|@import|url\(""", text), "nothing is fetched"


@pytest.mark.parametrize(
    ("changed", "field"),
    [
        ({"ttft": 0.001}, "slo.ttft_s"),
        ({"tpot": 0.0001}, "slo.tpot_s"),
        ({"ttft": -1}, "slo.ttft_s"),
        ({"ttft": "inf"}, "slo.ttft_s"),
        ({"tpot": "nan"}, "slo.tpot_s"),
        ({"attainment": "nan"}, "slo.attainment"),
        ({"rate": "nan"}, "rate"),
        ({"rate": "inf", "objective": "cost"}, "rate"),
        ({"power-cap": "inf"}, "power-cap"),
        ({"attainment": 1.5}, "slo.attainment"),
        ({"rate": 1e6}, "rate"),
        ({"rate": -1}, "rate"),
        ({"objective": "cost"}, "rate"),
        ({"objective": "costs"}, "did you mean 'cost'"),
        ({"power-cap": 1}, "power_cap_w"),
        ({"power-cap": -1}, "power-cap"),
        ({"requests": 3}, "requests"),
        ({"requests": 10**12}, "requests"),
        ({"output": "absent/plan.yaml"}, "output"),
        ({"report": "absent/page.html"}, "report"),
        ({"model": "llama-3.1-70b", "profile": None}, "GB short"),
        ({"ttft": 1e-4}, "% over the target"),
        ({"rate": 1e5}, "times as much is asked"),
        ({"model": "llama-3.1-8c"}, "llama-3.1-8b"),
        ({"hardware": "absent.yaml"}, "absent.yaml"),
        ({"workload": "absent.csv"}, "absent.csv"),
        ({"profile": "absent.json"}, "absent.json"),
    ],
)
def test_what_cannot_be_planned_is_one_line_and_status_2(tandem, files, changed, field):
    refused(tandem(*plan_arguments(files, **changed)), field)
    assert not (files / "plan.yaml").exists()


@pytest.mark.parametrize(
    ("text", "field"),
    [
        ("arrival_s,prompt_tokens\n0,5\n", "output_tokens"),
        ("arrival_s,prompt_tokens,output_tokens\n2,5,5\n1,5,5\n", "row 3, arrival_s"),
        ("arrival_s,prompt_tokens,output_tokens\n-2,5,5\n", "row 2, arrival_s"),
        ("arrival_s,prompt_tokens,output_tokens\n0,many,5\n", "row 2, prompt_tokens"),
        ("arrival_s,prompt_tokens,output_tokens\n0,5,100,20\n", "row 2: '20'"),
        ("arrival_s,prompt_tokens,output_tokens\n", "no requests"),
    ],
)
def test_a_bad_workload_is_one_line_and_status_2(tandem, files, text, field):
    path = write(files / "bad.csv", text)
    refused(tandem(*plan_arguments(files, workload=path)), field)


@pytest.mark.parametrize(
    ("text", "field"),
    [
        ("nodes: [{device: h1000}]", "h1000"),
        ("nodes: []", "hardware.nodes"),
        ("nodes: [{device: cpu-core, cores: 2}]", "cores"),
        ("nodes: [{device: cpu-core, price_per_hour: cheap}]", "price_per_hour"),
        ("- cpu-core", "mapping"),
    ],
)
def test_a_bad_fleet_is_one_line_and_status_2(tandem, files, text, field):
    path = write(files / "bad.yaml", text)
    refused(tandem(*plan_arguments(files, hardware=path)), field)


@pytest.mark.parametrize(
    ("document", "field"),
    [
        (profile_document("other"), "profile.model"),
        (profile_document("demo", "h100-80gb"), "profile.device"),
        ({"model": "demo"}, "profile.device"),
        ({"model": "demo", "device": "cpu-core", "runs": [3]}, "profile.runs"),
        ({**profile_document("demo"), "kv_dtype": "float8"}, "profile.kv_dtype"),
        ({**profile_document("demo"), "dtype": ["float32"]}, "profile.dtype"),
        (
            {**profile_document("demo"), "transfer": [{"bytes": 9, "seconds": 0}]},
            "transfer.seconds",
        ),
        ({**profile_document("demo"), "transfer": [{"bytes": 0, "seconds": 1}]}, "transfer.bytes"),
        ({**profile_document("demo"), "at_work": [{"steps": [STILL]}]}, "steps[0].processor_s"),
        ({**profile_document("demo"), "threads": "two"}, "profile.threads"),
    ],
)
def test_a_profile_of_something_else_is_refused(tandem, files, document, field):
    path = write(files / "other.json", json.dumps(document))
    refused(tandem(*plan_arguments(files, profile=path)), field)


@pytest.mark.parametrize("text", ["[]", "{"])
def test_a_model_whose_config_says_nothing_is_refused(tandem, files, text):
    write(files / "config.json", text)
    refused(tandem(*plan_arguments(files, model=files, profile=None)), "config.json")


@pytest.mark.parametrize("name", ["hardware", "workload", "profile"])
def test_a_file_that_is_not_text_is_refused(tandem, files, name):
    path = files / "binary"
    path.write_bytes(b"\xff\xfe\x00")
    refused(tandem(*plan_arguments(files, **{name: path})), "binary")


@pytest.mark.parametrize(
    ("changed", "field"),
    [
        ({"hardware": {}}, "plan.hardware"),
        ({"pools": []}, "pools"),
        ({"slo": [1]}, "slo"),
        ({"slo": {"ttft": 0.1}}, "did you mean 'ttft_s'"),
        ({"slo": {"ttft_s": float("nan")}}, "slo.ttft_s"),
        ({"speed": 1}, "speed"),
        ({"engine": 5}, "engine"),
        ({"engine": {"prefill": 5}}, "engine.prefill"),
        ({"engine": {"block_token": 32}}, "did you mean 'block_tokens'"),
        ({"engine": {"block_tokens": 33}}, "engine.block_tokens"),
        ({"gateway": {"admision": {}}}, "did you mean 'admission'"),
        ({"gateways": {}}, "did you mean 'gateway'"),
        ({"hardware": [1]}, "hardware"),
        ({"hardware": {"nodes": [{"device": "cpu-core", "devices": 1}]}}, "of 1"),
        ({"pools": [{"role": "mixed", "instances": 1000}]}, "take 1000 of cpu-core"),
        ({"pools": [{"role": "mixed", "device": "l4"}]}, "l4"),
        (
            {
                "hardware": {"nodes": [{"device": "cpu-core", "devices": 2, "count": 2}]},
                "pools": [{"role": "mixed", "tensor_parallel": 4}],
            },
            "pools[0]",
        ),
        (
            {
                "hardware": {"nodes": [{"device": "cpu-core", "devices": 6, "count": 2}]},
                "pools": [{"role": "mixed", "instances": 3, "tensor_parallel": 4}],
            },
            "these nodes: 2 of 6 cpu-core",
        ),
        ({"predicted": 5}, "predicted"),
        ({"pools": [{"role": "mixed", "nodes": 5}]}, "pools[0].nodes"),
        ({"pools": [{"role": "prefill"}]}, "pools"),
    ],
)
def test_a_plan_that_cannot_be_simulated_is_refused(tandem, files, changed, field):
    path = write(files / "own.yaml", yaml.safe_dump({**SPLIT_PLAN, **changed}))
    refused(tandem("simulate", "--plan", path, "--workload", files / "load.csv"), field)


def test_workloads_are_drawn_anew_and_instances_fail_where_it_is_asked_for(tandem, files):
    plan = write(files / "own.yaml", yaml.safe_dump(SPLIT_PLAN))
    given = ("simulate", "--plan", plan, "--workload", files / "load.csv")
    drawn = ("--lengths", "fitted", "--burstiness", 2, "--requests", 40, "--rate", 3, "--seed", 1)
    status, out, _ = tandem(*given, *drawn, "--json")
    figures = json.loads(out)
    assert (status, figures["requests"]) == (0, 40)
    assert figures["rate_rps"] == pytest.approx(3)
    status, out, _ = tandem(*given, "--day-swing", 0.5, "--peak-hour", 3, "--rate", 0.002, "--json")
    assert (status, json.loads(out)["duration_s"] > 43_200) == (0, True)
    fails = ("--fail", "decode-0@1", "--fail", "prefill-0@2", "--start-s", 3)
    status, out, err = tandem(*given, *fails, "--json")
    figures = json.loads(out)
    assert (status, err, figures["finished"]) == (0, "", 30)
    assert figures["failures"]["instances"] == 2
    assert figures["ttft_s"]["p99"] > 1
    status, out, err = tandem(*given, "--fail", "decode-0@1", "--fail", "decode-0@1")
    assert (status, "instances that failed: 1" in out) == (0, True)
    assert "not there: 1" in err


@pytest.mark.parametrize(
    ("options", "field"),
    [
        (("--lengths", "fit"), "did you mean 'fitted'"),
        (("--seed", 3), "seed"),
        (("--peak-hour", 3), "peak-hour"),
        (("--day-swing", 0.5, "--requests", 3), "requests"),
        (("--day-swing", 1.5), "day-swing"),
        (("--burstiness", -1), "burstiness"),
        (("--fail", "decode-1@3"), "did you mean 'decode-0'"),
        (("--fail", "decode-0"), "INSTANCE@SECONDS"),
        (("--fail", "decode-0@soon"), "INSTANCE@SECONDS"),
        (("--fail", "decode-0@inf"), "INSTANCE@SECONDS"),
        (("--fail", "@3"), "INSTANCE@SECONDS"),
    ],
)
def test_what_cannot_be_drawn_or_fail_is_refused(tandem, files, options, field):
    plan = write(files / "own.yaml", yaml.safe_dump(SPLIT_PLAN))
    refused(tandem("simulate", "--plan", plan, "--workload", files / "load.csv", *options), field)


def test_a_plan_can_be_made_for_fitted_lengths(tandem, files):
    status, _, _ = tandem(*plan_arguments(files, lengths="fitted"))
    assert (status, (files / "plan.yaml").exists()) == (0, True)
    refused(tandem(*plan_arguments(files, lengths="fit")), "did you mean 'fitted'")


def test_a_time_to_start_needs_a_policy_that_starts_something(tandem, files):
    plan = write(files / "own.yaml", yaml.safe_dump(SPLIT_PLAN))
    given = ("--plan", plan, "--workload", files / "load.csv")
    refused(tandem("simulate", *given, "--start-s", 5), "start-s")


def test_a_request_too_long_for_the_plans_memory_is_refused(tandem, files):
    plan = write(files / "own.yaml", yaml.safe_dump(SPLIT_PLAN))
    path = write(files / "long.csv", "arrival_s,prompt_tokens,output_tokens\n0,9000000,5\n")
    refused(tandem("simulate", "--plan", plan, "--workload", path), "9000005")


def test_kv_counts_in_the_floats_that_a_plan_without_a_profile_says(tandem, files):
    """Beside the weights of this model an L4 has room for 42,000 tokens of KV in 16 bits."""
    nodes = {"nodes": [{"device": "l4", "devices": 2}]}
    pools = [{"role": role, "device": "l4"} for role in ("prefill", "decode")]
    wide = {**SPLIT_PLAN, "model": "llama-3.1-8b", "hardware": nodes, "pools": pools}
    narrow = {**wide, "engine": {"kv_dtype": "float8_e4m3fn"}}
    load = write(files / "long.csv", "arrival_s,prompt_tokens,output_tokens\n0,60000,5\n")
    paths = [write(files / f"{len(one)}.yaml", yaml.safe_dump(one)) for one in (wide, narrow)]
    answers = [tandem("simulate", "--plan", path, "--workload", load, "--json") for path in paths]
    refused(answers[0], "the longest request has 60005 tokens")
    status, out, err = answers[1]
    assert (status, err, json.loads(out)["finished"]) == (0, "", 1)
    books = [cost_book("llama-3.1-8b", nodes, config_of(path).engine) for path in paths]
    deployed = [deployment_for(read_plan_file(paths[0]), book) for book in books]
    copies_s = [one.copy_s(*one.instances, 60000) for one in deployed]
    assert copies_s[1] < 0.6 * copies_s[0]


@pytest.mark.parametrize(
    "engine", [{"dtype": "float32"}, {"kv_dtype": "float8_e4m3fn"}, {"threads": 2}]
)
def test_a_profile_of_instances_that_are_set_otherwise_is_refused(tandem, files, engine):
    said = {"dtype": "bfloat16", "kv_dtype": "bfloat16", "threads": 1}
    profile = write(files / "said.json", json.dumps(profile_document("demo") | said))
    agreed = {**SPLIT_PLAN, "engine": {"dtype": "bfloat16"}}
    for own, status in ((SPLIT_PLAN, 0), (agreed, 0), ({**SPLIT_PLAN, "engine": engine}, 2)):
        plan = write(files / "own.yaml", yaml.safe_dump(own))
        given = ("--plan", plan, "--workload", files / "load.csv", "--profile", profile)
        answer = tandem("simulate", *given, "--json")
        assert answer[0] == status
    refused(answer, f"engine.{next(iter(engine))}")


def test_measured_transfers_take_the_place_of_the_catalogs_link(files):
    fleet = {"nodes": [{"device": "cpu-core"}], "profile": str(files / "profile.json")}
    (group,) = cost_book("demo", fleet).hardware.groups
    assert group.link.name == "shared-memory"
    assert group.link.transfer_s(2_000_000) == pytest.approx(6e-4, rel=0.05)


def test_the_built_in_model_has_a_shape_of_its_own():
    shape, config = find_shape("demo"), open_checkpoint("demo").config
    assert shape.name == "demo"
    assert (shape.layers, shape.kv_heads) == (len(config.layers), config.kv_heads)


def test_a_pass_is_written_so_that_its_sums_are_read_back():
    one = Pass(((64, 0), (32, 100)), (7, 9))
    document = profile_document("demo")
    document["runs"][0]["mixed"] = [profile_entry(one, 0.5)]
    *_, sample = profile_from(document).runs[0].samples
    assert sample.seconds == 0.5
    assert sample.step == mixed_step(one.prompts, one.contexts)


def test_no_pass_is_longer_than_the_model_allows():
    for quick in (True, False):
        passes = list(passes_of(500, quick=quick))
        assert {one.kind for one in passes} == {"prefill", "decode", "mixed"}
        assert max(sum(length) for one in passes for length in one.lengths) <= 500


def test_the_engine_is_measured_and_its_fit_can_be_planned_with(tandem, tmp_path):
    path = tmp_path / "measured.json"
    arguments = ("profile", "demo", "-o", path, "--quick", "--rounds", 1, "--device", "cpu")
    status, out, err = tandem(*arguments, "--neighbours", 1)
    assert status == 0
    assert "samples, error" in out
    assert "neighbours that compute: 1" in out
    assert "KV transfer" in out
    assert "measuring" in err
    fleet = {"nodes": [{"device": "cpu-core"}], "profile": str(path)}
    book = cost_book("demo", fleet)
    assert isinstance(book.latency(Cut("cpu-core")), Measured)
    assert isinstance(book.instance(Cut("cpu-core"), Role.MIXED).crowded, Measured)
    assert book.kv_tokens(Cut("cpu-core")) > 0


@pytest.mark.parametrize(
    ("changed", "field"),
    [
        (("--device", "tpu"), "device"),
        (("--device", "cpu", "--device-name", "cpu-cores"), "cpu-core"),
        (("--device", "cpu", "--dtype", "int3"), "dtype"),
        (("--device", "cpu", "--kv-dtype", "int3"), "kv_dtype"),
        (("--device", "cpu", "--kv-dtype", "float8_e4m3fn"), "kv_dtype"),
    ],
)
def test_what_cannot_be_profiled_is_refused(tandem, tmp_path, changed, field):
    refused(tandem("profile", "demo", "-o", tmp_path / "p.json", *changed), field)


def test_a_server_on_gpus_is_not_measured():
    settings = Measuring("demo", Device("cuda", "h100-80gb"), serving=1)
    with pytest.raises(Unsupported, match="on CPUs only"):
        measure(settings, lambda done, total: None)


def test_a_profile_that_could_not_be_written_is_not_measured(tandem, tmp_path):
    refused(tandem("profile", "demo", "-o", tmp_path / "absent" / "p.json"), "output")


def test_a_model_that_is_not_there_cannot_be_profiled(tandem, tmp_path):
    refused(tandem("profile", "./absent", "-o", tmp_path / "p.json"), "absent")


POLICY = {
    "budget_accelerators": 4,
    "metrics_interval_s": 0.5,
    "look_back_period_s": 2,
    "upscale_delay_s": 0,
    "downscale_delay_s": 2,
    "roles": {
        "prefill": {
            "min_replicas": 2,
            "max_replicas": 2,
            "signals": [{"signal": "queued_prompt_tokens", "target": 1}],
        },
        "decode": {"max_replicas": 2, "signals": [{"signal": "batch", "target": 0.01}]},
    },
}


IDLE = {"min_replicas": 0, "max_replicas": 1}


def test_a_policy_is_followed_with_its_cost_and_its_changes(tandem, files):
    plan = write(files / "own.yaml", yaml.safe_dump(SPLIT_PLAN))
    policy = write(files / "policy.yaml", yaml.safe_dump(POLICY))
    given = ("--plan", plan, "--workload", files / "load.csv", "--policy", policy, "--start-s", 1)
    status, out, _ = tandem("simulate", *given, "--json")
    figures = json.loads(out)
    fleet = figures["fleet"]
    assert (status, figures["finished"]) == (0, 30)
    assert fleet["most_accelerators"] <= 4
    assert fleet["starts"] > 0
    assert fleet["timeline"][-1]["prefill"] == 2
    assert fleet["timeline"][0] == {"time_s": 0.0, "prefill": 1, "decode": 1}
    assert fleet["accelerator_hours"] > fleet["plan_accelerator_hours"]
    assert fleet["cost"] > 0
    assert all(turns >= 0 for turns in fleet["direction_changes_per_hour"].values())
    status, out, err = tandem("simulate", *given)
    assert (status, err) == (0, "")
    assert "accelerator-hours" in out


def test_the_balancer_of_a_fleet_that_follows_a_policy_is_the_plans(tandem, files, monkeypatch):
    seen = []

    class Seen(Simulation):
        def __init__(self, deployment, load, dynamics):
            seen.append(dynamics)
            super().__init__(deployment, load, dynamics=dynamics)

    monkeypatch.setattr(simulator, "Simulation", Seen)
    policy = write(files / "policy.yaml", yaml.safe_dump(POLICY))
    for migration, balance in (({}, True), ({"enabled": False, "interval_s": 3.0}, False)):
        plan = write(files / "own.yaml", yaml.safe_dump({**SPLIT_PLAN, "migration": migration}))
        given = ("--plan", plan, "--workload", files / "load.csv", "--policy", policy)
        status, _, _ = tandem("simulate", *given, "--start-s", 1)
        assert status == 0
        assert seen[-1].balance == balance
    assert seen[-1].look_s == 3.0
    assert seen[-1].start_s == 1.0
    plan = write(files / "own.yaml", yaml.safe_dump({**SPLIT_PLAN, "migration": {"on": True}}))
    refused(tandem("simulate", "--plan", plan, *given[2:]), "migration")


@pytest.mark.parametrize(
    ("changed", "more", "field"),
    [
        ({"budget_accelerators": 1, "roles": {"prefill": IDLE}}, (), "budget_accelerators"),
        ({"budgets": 4}, (), "line 2: budgets"),
        ({}, ("--report", "page.html"), "report"),
        ({}, ("--admission",), "admission"),
        ({}, ("--start-s", "nan"), "start-s"),
    ],
)
def test_a_policy_that_cannot_be_followed_is_refused(tandem, files, changed, more, field):
    plan = write(files / "own.yaml", yaml.safe_dump(SPLIT_PLAN))
    text = yaml.safe_dump({**changed, **{k: v for k, v in POLICY.items() if k not in changed}})
    policy = write(files / "policy.yaml", text)
    given = ("--plan", plan, "--workload", files / "load.csv", "--policy", policy)
    refused(tandem("simulate", *given, *more), field)


def test_a_profile_tells_of_its_device_in_nodes_of_every_size(files):
    nodes = [{"device": "cpu-core", "devices": size} for size in (2, 4)]
    book = cost_book("demo", {"nodes": nodes, "profile": str(files / "profile.json")})
    kinds = ["cpu-core", "cpu-core/devices=4"]
    assert [group.device.name for group in book.hardware.groups] == kinds
    assert {type(book.latency(Cut(kind))) for kind in kinds} == {Measured}
