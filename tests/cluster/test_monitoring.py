"""The dashboard, the alerts and the documentation speak of metrics that exist."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.watching.metrics import SPECS

ROOT = Path(__file__).resolve().parents[2]
MONITORING = ROOT / "docs/monitoring"
SUFFIXES = ("_bucket", "_sum", "_count")


def mentioned(text: str) -> set[str]:
    return set(re.findall(r"\btandem_[a-z0-9_]+[a-z0-9]", text))


def unknown(text: str) -> set[str]:
    names = {spec.name for spec in SPECS}
    names |= {spec.name + suffix for spec in SPECS if spec.buckets for suffix in SUFFIXES}
    return mentioned(text) - names


def queries() -> list[str]:
    board = json.loads((MONITORING / "grafana.json").read_text())
    return [target["expr"] for panel in board["panels"] for target in panel["targets"]]


def test_the_dashboard_uses_only_metrics_that_exist() -> None:
    assert [query for query in queries() if not mentioned(query)] == []
    assert unknown("\n".join(queries())) == set()


def test_the_dashboard_shows_every_metric() -> None:
    shown = "\n".join(queries())
    assert [spec.name for spec in SPECS if spec.name not in shown] == []


def test_the_dashboard_groups_only_by_labels_that_exist() -> None:
    labels = {label for spec in SPECS for label in spec.labels} | {"le"}
    grouped = re.findall(r"by \(([^)]*)\)", "\n".join(queries()))
    assert {name.strip() for group in grouped for name in group.split(",")} <= labels


def test_the_dashboard_is_what_its_script_writes() -> None:
    script = ROOT / "scripts/gen_grafana"
    subprocess.run([sys.executable, str(script), "--check"], check=True)


def test_alerts_and_documentation_name_metrics_that_exist() -> None:
    assert unknown((MONITORING / "alerts.yml").read_text()) == set()
    documented = (ROOT / "docs/monitoring.md").read_text()
    assert unknown(documented) == set()
    assert {spec.name for spec in SPECS} <= mentioned(documented)


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")
def test_promtool_accepts_the_configuration_and_every_query(tmp_path: Path) -> None:
    subprocess.run(["promtool", "check", "config", "prometheus.yml"], cwd=MONITORING, check=True)
    rules = [
        {"record": f"panel:{number}", "expr": query.replace("$__rate_interval", "1m")}
        for number, query in enumerate(queries())
    ]
    file = tmp_path / "queries.json"
    file.write_text(json.dumps({"groups": [{"name": "panels", "rules": rules}]}))
    subprocess.run(["promtool", "check", "rules", str(file)], check=True)
