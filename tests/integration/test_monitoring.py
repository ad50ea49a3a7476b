"""Alert rules and the dashboard against the metrics that there are."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import yaml

from image_classifier.serving.telemetry import Metrics
from tests.conftest import PROJECT, require_program, run_program

FOLDER = PROJECT / "docs" / "monitoring"
FUNCTIONS = {
    "sum",
    "max",
    "by",
    "le",
    "rate",
    "increase",
    "histogram_quantile",
    "absent",
    "option",
    "reason",
    "result",
    "version",
}
FUNCTIONS |= {"http_response_status_code", "class"}


def list_metrics() -> set[str]:
    """List the names under which the server's metrics can be asked for."""
    endings = {"histogram": ("_bucket", "_sum", "_count"), "counter": ("_total",), "gauge": ("",)}
    families = Metrics().registry.collect()
    return {family.name + ending for family in families for ending in endings.get(family.type, ("",))}


def list_names(expression: str) -> set[str]:
    """List the metrics that an expression asks for."""
    bare = re.sub(r"\{[^}]*\}|\[[^\]]*\]|\"[^\"]*\"", "", expression)
    return set(re.findall(r"\b[a-z_]{3,}\b", bare)) - FUNCTIONS


def test_every_query_of_the_dashboard_names_a_metric_that_exists() -> None:
    dashboard: dict[str, Any] = json.loads((FOLDER / "dashboard.json").read_text())
    expressions = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    assert len(expressions) > 10
    for expression in expressions:
        names = list_names(expression)
        assert names and names <= list_metrics(), expression


def test_every_alert_names_a_metric_that_exists() -> None:
    (group,) = yaml.safe_load((FOLDER / "alerts.yaml").read_text())["groups"]
    for rule in group["rules"]:
        names = list_names(rule["expr"])
        assert names and names <= list_metrics(), rule["expr"]


def test_the_alerts_are_valid_and_fire_when_they_should(tmp_path: Path) -> None:
    promtool = require_program("promtool")
    run_program(promtool, "check", "rules", FOLDER / "alerts.yaml", cwd=tmp_path)
    run_program(promtool, "test", "rules", "alerts_test.yaml", cwd=FOLDER)


def test_the_metrics_are_what_prometheus_reads(tmp_path: Path) -> None:
    (tmp_path / "metrics").write_bytes(Metrics().render())
    promtool = require_program("promtool")
    run_program("sh", "-c", f"{promtool} check metrics < metrics", cwd=tmp_path)
