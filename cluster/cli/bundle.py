"""What a bug report needs in one archive: versions, machine, config, plan, state and metrics.

No prompts, answers or keys: requests appear as counts, and key files only as paths.
"""

from __future__ import annotations

import json
import platform
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx

from cluster.cli.doctor import examine
from cluster.cli.status import as_document, summarize
from cluster.config import load_config
from cluster.packages import TANDEM, package_version
from cluster.yaml_file import read_yaml
from engine.errors import BadInput, TandemError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from cluster.client import Client

PACKAGES = (
    TANDEM, "ray", "torch", "numpy", "grpcio", "protobuf", "pyzmq", "nixl", "uvicorn",
    "starlette", "pydantic", "tokenizers", "safetensors", "llguidance", "prometheus-client",
    "opentelemetry-sdk", "cupy-cuda13x", "nvidia-nccl-cu13",
)  # fmt: skip
METRICS_S = 10.0
README = """What `tandem report` collected about this Tandem cluster. There are no prompts, no
answers and no keys in it; look through it before you pass it on.
"""


def versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "platform": platform.platform()}
    return found | {name: package_version(name) or "not installed" for name in PACKAGES}


def collect(
    connect: Callable[[], Client], api_key: str | None, source: str | None
) -> dict[str, str]:
    """The bundle's files by name; what could not be had is told in `missing.txt`."""
    files = {"README.txt": README, "versions.json": _json(versions())}
    files["machine.json"] = _json([finding.as_dict() for finding in examine()])
    if source is not None:
        files |= _of_source(source)
    try:
        with connect() as client:
            status, description = as_document(client.status()), client.describe()
        files |= _of_cluster(status, json.loads(description.seen), json.loads(description.config))
        files["metrics.txt"] = _metrics(status["endpoints"]["http"], api_key)
    except BadInput:
        raise
    except (TandemError, httpx.HTTPError) as error:
        files["missing.txt"] = f"the running cluster: {type(error).__name__}: {error}\n"
    return files


def _of_source(source: str) -> dict[str, str]:
    """What `tandem serve` was given, as it was read, and the plan if it was one."""
    files = {"given.json": load_config(source).model_dump_json(indent=2) + "\n"}
    if source.endswith((".yaml", ".yml")):
        values = read_yaml(Path(source))
        if isinstance(values.get("pools"), list):
            files["given_plan.json"] = _json(values)
    return files


def _of_cluster(
    status: Mapping[str, Any], seen: Mapping[str, Any], config: Mapping[str, Any]
) -> dict[str, str]:
    """Requests are only counted: their ids may be a client's own."""
    counted = {**status, "requests": summarize(dict(status))["requests"]}
    return {
        "status.json": _json(counted),
        "config.json": _json(config),
        "plan.json": _json({name: seen[name] for name in ("slo", "predicted", "observed")}),
        "history.json": _json({name: seen[name] for name in ("gateways", "totals", "history")}),
    }


def _metrics(url: str, api_key: str | None) -> str:
    headers = {} if api_key is None else {"authorization": f"Bearer {api_key}"}
    answer = httpx.get(f"{url}/metrics", headers=headers, timeout=METRICS_S)
    answer.raise_for_status()
    return answer.text


def _json(value: object) -> str:
    return json.dumps(value, indent=2) + "\n"


def write_bundle(path: Path, files: Mapping[str, str]) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, text in files.items():
            archive.writestr(name, text)
