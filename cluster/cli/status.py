"""The cluster's status as a document and as tables."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.table import Table

if TYPE_CHECKING:
    from cluster.rpc import tandem_pb2 as pb

INSTANCE_FIELDS = (
    "id",
    "role",
    "state",
    "node",
    "device",
    "tensor_parallel",
    "pipeline_parallel",
    "queue_requests",
    "running_sequences",
    "free_blocks",
    "total_blocks",
)
REQUEST_FIELDS = (
    "id",
    "state",
    "prefill",
    "decode",
    "epoch",
    "prompt_tokens",
    "output_tokens",
    "migrations",
)
REQUESTS_SHOWN = 20


def as_document(reply: pb.StatusReply) -> dict[str, Any]:
    """What `status --json` promises."""
    slo = reply.slo
    return {
        "model": reply.model,
        "endpoints": {"http": reply.endpoints.http, "grpc": reply.endpoints.grpc},
        "instances": [_instance(instance) for instance in reply.instances],
        "requests": [{f: getattr(r, f) for f in REQUEST_FIELDS} for r in reply.requests],
        "slo": {
            "ttft_s": slo.ttft_s,
            "tpot_s": slo.tpot_s,
            "attainment": slo.attainment if slo.HasField("attainment") else None,
            "window_s": slo.window_s,
        },
        "policy": _policy(reply.policy) if reply.HasField("policy") else None,
    }


def _policy(policy: pb.PolicyStatus) -> dict[str, Any]:
    names = ("name", "version", "dry_run", "replan")
    return {name: getattr(policy, name) for name in names}


def _instance(instance: pb.Instance) -> dict[str, Any]:
    document: dict[str, Any] = {name: getattr(instance, name) for name in INSTANCE_FIELDS}
    document["workers"] = [
        {"rank": w.rank, "pid": w.pid, "node": w.node, "device": w.device} for w in instance.workers
    ]
    return document


def draw(status: dict[str, Any]) -> Group:
    """Instances, then the requests under way."""
    instances = _table("instance", "role", "state", "device", "tp x pp", "pids", "queue", "running",
                       "KV used", folds="pids", title=_title(status))  # fmt: skip
    for one in status["instances"]:
        used = one["total_blocks"] - one["free_blocks"]
        instances.add_row(
            one["id"],
            one["role"],
            one["state"],
            one["device"],
            f"{one['tensor_parallel']} x {one['pipeline_parallel']}",
            " ".join(str(worker["pid"]) for worker in one["workers"]),
            str(one["queue_requests"]),
            str(one["running_sequences"]),
            f"{100 * used / max(one['total_blocks'], 1):.0f}% of {one['total_blocks']}",
        )
    requests = _table(
        "request", "state", "prefill", "decode", "prompt", "output", "moves", folds="request"
    )
    for one in status["requests"][:REQUESTS_SHOWN]:
        requests.add_row(
            one["id"],
            one["state"],
            one["prefill"],
            one["decode"],
            str(one["prompt_tokens"]),
            str(one["output_tokens"]),
            str(one["migrations"]),
        )
    more = len(status["requests"]) - REQUESTS_SHOWN
    return Group(instances, requests, f"... and {more} more requests" if more > 0 else "")


def _table(*columns: str, folds: str, title: str | None = None) -> Table:
    """Narrow, and nothing cut: names are typed into other commands; one column folds instead."""
    table = Table(box=SIMPLE_HEAD, title=title, title_justify="left", padding=(0, 1, 0, 0))
    for column in columns:
        table.add_column(column, no_wrap=column != folds, overflow="fold")
    return table


def _title(status: dict[str, Any]) -> str:
    slo, endpoints = status["slo"], status["endpoints"]
    share = slo["attainment"]
    met = "no request yet" if share is None else f"{100 * share:.1f}% met"
    return (
        f"{status['model']} at {endpoints['http']} and {endpoints['grpc']}; "
        f"TTFT {slo['ttft_s']:g} s and TPOT {slo['tpot_s']:g} s: {met} in {slo['window_s']:g} s"
        f"{_in_force(status['policy'])}"
    )


def _in_force(policy: dict[str, Any] | None) -> str:
    if policy is None:
        return ""
    dry = ", dry run" if policy["dry_run"] else ""
    return f"; policy {policy['name']} {policy['version']}{dry}"


def summarize(status: dict[str, Any]) -> dict[str, Any]:
    """Counts instead of lists."""
    instances = Counter(f"{one['role']} {one['state']}" for one in status["instances"])
    requests = Counter(one["state"] for one in status["requests"])
    return {
        "model": status["model"],
        "instances": dict(sorted(instances.items())),
        "requests": dict(sorted(requests.items())),
        "migrations": sum(one["migrations"] for one in status["requests"]),
        "slo": status["slo"],
        "policy": status["policy"],
    }
