"""Alert rules and dashboards: against the metrics that there are, and with a real Prometheus that watches a server."""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import math
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import yaml
from numpy.typing import NDArray

from image_classifier.published.folder import MODEL
from image_classifier.serving.telemetry import ECS_VERSION, Metrics, build_formatter
from tests.conftest import PROJECT, find_port, require_program, run_program
from tests.ecs import FIELDS, check_line
from tests.prometheus import FOLDER, Prometheus, list_metrics, list_names, quicken_rules, wait_for, watching
from tests.serving import (
    PIXELS,
    Running,
    draw_images,
    encode,
    serving,
    wait_until_ready,
    write_model,
    write_published_model,
)

DASHBOARDS = sorted(path.name for path in (FOLDER / "grafana").glob("*.json"))
KEY, CANARY_KEY = "a-key-of-prometheus", "a-key-of-the-canary"
IMAGES = draw_images(16)


def load_panels(name: str) -> list[dict[str, Any]]:
    """Load the panels of a dashboard."""
    panels: list[dict[str, Any]] = json.loads((FOLDER / "grafana" / name).read_text())["panels"]
    return panels


def list_expressions() -> list[str]:
    """List the queries of all dashboards."""
    panels = itertools.chain.from_iterable(map(load_panels, DASHBOARDS))
    return [target["expr"] for panel in panels for target in panel["targets"]]


@pytest.mark.parametrize("name", DASHBOARDS)
def test_a_dashboard_is_whole(name: str) -> None:
    panels = load_panels(name)
    (source,) = yaml.safe_load((FOLDER / "grafana" / "datasources.yaml").read_text())["datasources"]
    assert len({panel["id"] for panel in panels}) == len({panel["title"] for panel in panels}) == len(panels) >= 10
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        assert panel["datasource"] == {"type": source["type"], "uid": source["uid"]}
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        columns, rows = (range(place[at], place[at] + place[size]) for at, size in (("x", "w"), ("y", "h")))
        cells = set(itertools.product(columns, rows))
        assert not cells & taken, panel["title"]
        taken |= cells


def test_compose_gives_grafana_what_it_is_told_to_read() -> None:
    services = yaml.safe_load((PROJECT / "docker-compose.yaml").read_text())["services"]
    mounted = {}
    for volume in services["grafana"]["volumes"]:
        source, target, mode = volume.split(":")
        assert (PROJECT / source).is_file() and mode == "ro"
        mounted[target] = PROJECT / source
    (provider,) = yaml.safe_load((FOLDER / "grafana" / "dashboards.yaml").read_text())["providers"]
    shown = {path.name for target, path in mounted.items() if target.startswith(provider["options"]["path"] + "/")}
    assert shown == set(DASHBOARDS) == {"technical.json", "business.json"}
    (source,) = yaml.safe_load((FOLDER / "grafana" / "datasources.yaml").read_text())["datasources"]
    assert source["url"] == "http://prometheus:9090"
    (job,) = yaml.safe_load((FOLDER / "prometheus.yml").read_text())["scrape_configs"]
    host, _, port = job["static_configs"][0]["targets"][0].partition(":")
    server = services["ml-api-service"]
    assert (host, port) == (server["hostname"], server["environment"]["IMAGE_CLASSIFIER_PORT"])


def test_filebeat_sends_what_the_server_writes_to_the_elasticsearch_beside_it() -> None:
    services = yaml.safe_load((PROJECT / "docker-compose.yaml").read_text())["services"]
    settings = yaml.safe_load((FOLDER / "filebeat.yml").read_text())
    (source,) = settings["filebeat.inputs"]
    folders = [volume.split(":")[1] for volume in services["filebeat"]["volumes"]]
    assert any(source["paths"][0].startswith(folder + "/") for folder in folders)
    assert "/usr/share/filebeat/filebeat.yml" in folders
    (processor,) = settings["processors"]
    record = logging.LogRecord("image_classifier", logging.INFO, "", 0, "loaded", None, None)
    line = json.loads(build_formatter("ecs").format(record))
    assert processor["drop_event"] == {"when.not.equals.service.name": line["service"]["name"]}
    (url,) = settings["output.elasticsearch.hosts"]
    assert url == "http://elasticsearch:9200" and "elasticsearch" in services
    assert "IMAGE_CLASSIFIER_LOG_FORMAT" not in services["ml-api-service"]["environment"]  # the image's own is ECS


def test_every_query_of_the_dashboards_names_a_metric_that_exists() -> None:
    for expression in list_expressions():
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


def test_the_configurations_are_valid(tmp_path: Path) -> None:
    run_program(require_program("promtool"), "check", "config", FOLDER / "prometheus.yml", cwd=tmp_path)
    run_program(require_program("amtool"), "check-config", FOLDER / "alertmanager.yml", cwd=tmp_path)


def test_the_metrics_are_what_prometheus_reads(tmp_path: Path) -> None:
    (tmp_path / "metrics").write_bytes(Metrics().render())
    promtool = require_program("promtool")
    run_program("sh", "-c", f"{promtool} check metrics < metrics", cwd=tmp_path)


# With a real Prometheus


FRACTION = 0.5
"""Of the callers, whom the canary answers."""


def choose_caller(digests: list[str], is_for_canary: bool) -> str:
    """Choose a name of a caller whom each of two canaries would answer, or neither."""

    def is_answered(name: str, digest: str) -> bool:
        share = hashlib.blake2b(f"{digest} {name}".encode(), digest_size=8).digest()
        return int.from_bytes(share, "big") / 2**64 < FRACTION

    names = (f"caller-{number}" for number in range(100))
    return next(name for name in names if all(is_answered(name, digest) == is_for_canary for digest in digests))


class Watched:
    """A server that wants keys and may be broken, and the Prometheus that watches it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port = find_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.model, self.keys, self.key_file = folder / "model", folder / "keys", folder / "key"
        self.captured, self.canary = folder / "captured", folder / "canary"
        first = write_published_model(folder / "canary-0", IMAGES, width=512)
        self.canary.symlink_to(first)
        self.failing = write_model(folder / "failing.onnx", fails_on_white=True)
        digests = [hashlib.sha256(path.read_bytes()).hexdigest() for path in (first / MODEL, self.failing)]
        self.callers = {KEY: choose_caller(digests, False), CANARY_KEY: choose_caller(digests, True)}
        self.write_model()
        self.write_keys()
        self.key_file.write_text(KEY)
        self.process: subprocess.Popen[bytes]

    def write_model(self, seed: int = 0) -> None:
        """Publish a slow model that is unsure of all images, and whose test set is `IMAGES`."""
        self._point(write_published_model(self.folder / f"model-{seed}", IMAGES, seed=seed, width=512))

    def break_model(self) -> None:
        """Publish what is no model."""
        self._point(self.folder / "none")

    def _point(self, folder: Path) -> None:
        new = self.folder / "new"
        new.symlink_to(folder)
        new.rename(self.model)

    def write_keys(self) -> None:
        lines = [f"{name}:{hashlib.sha256(key.encode()).hexdigest()}\n" for key, name in self.callers.items()]
        self.keys.write_text("".join(lines))

    def start(self) -> None:
        words = [sys.executable, "-m", "image_classifier", "serve", str(self.model), "--port", str(self.port)]
        words += ["--num_threads", "1", "--drain_s", "0", "--reload_every_s", "0", "--timeout_s", "2"]
        words += ["--api_keys_file", str(self.keys), "--drift_window", "200"]
        words += ["--canary", str(self.canary), "--canary_fraction", str(FRACTION)]
        words += ["--capture", str(self.captured), "--capture_fraction", "1", "--capture_flush_s", "0.2"]
        with open(self.folder / "log", "ab") as log:
            self.process = subprocess.Popen(words, cwd=PROJECT, stdout=log, stderr=log)
        wait_until_ready(Running(self.process, self.url, self.port, self.folder / "log"))

    def fill(self, images: NDArray[np.uint8]) -> None:
        """Have images answered until they are all that is looked at for drift."""
        for start in [*range(0, len(images), 8)] * 13:
            assert self.ask(images[start : start + 8].tobytes()) == 200

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(30)

    def ask(self, body: bytes, kind: str = PIXELS["content-type"], key: str = KEY) -> int:
        headers = {"content-type": kind, "x-api-key": key}
        with suppress(httpx.TransportError):
            return httpx.post(f"{self.url}/predict", content=body, headers=headers, timeout=30).status_code
        return 0


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Watched, Prometheus]]:
    """A server, and Prometheus and Alertmanager that watch it."""
    folder = tmp_path_factory.mktemp("watched")
    server = Watched(folder)
    server.start()
    with ExitStack() as stack:
        stack.callback(lambda: server.stop())
        yield server, stack.enter_context(watching(folder, f"127.0.0.1:{server.port}", server.key_file))


def test_every_panel_shows_data(watched: tuple[Watched, Prometheus]) -> None:
    server, prometheus = watched
    expressions = [text.replace("$__rate_interval", "20s").replace("$__range", "1h") for text in list_expressions()]
    assert len(expressions) > 25
    deadline = time.monotonic() + 30
    while empty := [text for text in expressions if not any(map(has_value, prometheus.query(text)))]:
        assert time.monotonic() < deadline, empty
        server.fill(IMAGES)
        for image in draw_images(3, seed=len(empty)):
            assert server.ask(image.tobytes()) == server.ask(encode(image), "image/png") == 200
        assert server.ask(IMAGES[0].tobytes(), key=CANARY_KEY) == 200
        assert server.ask(b"no image", "image/png") == 422
        assert httpx.post(f"{server.url}/predict", content=IMAGES[0].tobytes(), headers=PIXELS).status_code == 401


def has_value(series: dict[str, Any]) -> bool:
    return math.isfinite(float(series["value"][1]))


def test_every_rule_fires_and_resolves_when_its_cause_is_there_and_gone(watched: tuple[Watched, Prometheus]) -> None:
    server, prometheus = watched
    (group,) = yaml.safe_load((FOLDER / "alerts.yaml").read_text())["groups"]
    names = {rule["alert"] for rule in group["rules"]}
    wait_for(lambda: not prometheus.list_firing(), "nothing fires at the beginning")

    with ThreadPoolExecutor(12) as pool:  # more than the server can compute in time
        loads = [pool.submit(server.ask, draw_images(64, seed=seed).tobytes()) for seed in range(1000, 1080)]
        expected = {"ImageClassifierErrors", "ImageClassifierRefuses", "ImageClassifierSlow", "ImageClassifierUnsure"}
        wait_for(lambda: prometheus.list_firing() >= expected, f"{expected} fire")
        for load in loads:
            load.cancel()
    server.fill(IMAGES)
    wait_for(lambda: not prometheus.list_firing(), "all resolved")
    server.fill(IMAGES // 2)
    wait_for(lambda: prometheus.list_firing() >= {"ImageClassifierDrifts"}, "drift fires")
    server.fill(IMAGES)
    wait_for(lambda: not prometheus.list_firing(), "all resolved")
    server.break_model()
    server.keys.write_text("prometheus:")
    server.failing.rename(server.canary)
    server.process.send_signal(signal.SIGHUP)
    wait_for(lambda: "serving version" in (server.folder / "log").read_text(), "the canary is loaded")
    kept = server.captured.rename(server.folder / "kept")
    server.captured.write_bytes(b"")
    assert server.ask(b"\xff" * 3072, key=CANARY_KEY) == 200
    expected = {f"ImageClassifier{what}" for what in ("ReloadFails", "KeysStay", "CaptureLoses", "CanaryFails")}
    wait_for(lambda: prometheus.list_firing() >= expected, f"{expected} fire")
    server.write_model(seed=1)
    server.write_keys()
    server.captured.unlink()
    kept.rename(server.captured)
    wait_for(lambda: not prometheus.list_firing(), "all resolved")

    server.stop()
    wait_for(lambda: prometheus.list_firing() == {"ImageClassifierDown"}, "the server is missed")
    server.start()
    wait_for(lambda: not prometheus.list_firing(), "the server is seen again")
    for status in ("firing", "resolved"):
        wait_for(lambda: prometheus.list_told(status) >= names, f"Alertmanager tells of all that is {status}")
    severities = {rule["alert"]: rule["labels"]["severity"] for rule in group["rules"]}
    assert all(alert["receiver"] == severities[alert["labels"]["alertname"]] for alert in prometheus.told)


def test_what_is_quickened_are_times_alone() -> None:
    text = (FOLDER / "alerts.yaml").read_text()
    before, after = (yaml.safe_load(each)["groups"][0]["rules"] for each in (text, quicken_rules(text)))
    for rule, quick in zip(before, after, strict=True):
        assert quick["expr"] == re.sub(r"\[\w+\]", "[4s]", rule["expr"])
        assert {**rule, "expr": "", "for": ""} == {**quick, "expr": "", "for": ""}


# The log


def test_every_line_of_the_log_is_a_document_of_the_elastic_common_schema(tmp_path: Path) -> None:
    model, keys, log = write_model(tmp_path / "model.onnx"), tmp_path / "keys", tmp_path / "log"
    keys.write_text(f"prometheus:{hashlib.sha256(KEY.encode()).hexdigest()}\n")
    options = ("--log_format", "ecs", "--api_keys_file", keys, "--log_lines_per_s", "2")
    trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    with serving(model, log, *options) as server:
        for number in range(6):
            headers = PIXELS | {"x-api-key": KEY, "traceparent": trace}
            assert httpx.post(f"{server.url}/predict", content=IMAGES[0].tobytes(), headers=headers).status_code == 200
            assert httpx.get(f"{server.url}/caf\u00e9%0A{number}").status_code == 401
        time.sleep(1)
        model.write_bytes(b"no model")
        server.process.send_signal(signal.SIGHUP)
        wait_for(lambda: "reloading the model failed" in log.read_text(), "the failed reload is logged")
    lines = [check_line(line) for line in log.read_text().splitlines()]
    assert {line["ecs.version"] for line in lines} == {ECS_VERSION}
    assert {line["log.level"] for line in lines} >= {"info", "error"}
    seen = {name for line in lines for name in line}
    assert seen >= FIELDS.keys() - {"error.message", "error.stack_trace", "error.type"}
    assert "labels.lines_left_out" in seen


def test_the_line_of_an_unexpected_error_is_one_too() -> None:
    try:
        raise ValueError("a reason\nof two lines")
    except ValueError:
        record = logging.LogRecord("name", logging.ERROR, "file.py", 1, "it %s", ("failed",), sys.exc_info(), "work")
    line = build_formatter("ecs").format(record)
    assert "\n" not in line
    fields = check_line(line)
    assert fields["error.type"] == "ValueError" and "raise ValueError" in fields["error.stack_trace"]


@pytest.mark.parametrize(
    "line",
    [
        '{"message": "no time"}',
        '{"@timestamp": "2026-01-01T00:00:00Z", "ecs.version": "9.0.0", "log.level": "info", "message": "", "x": 1}',
        '{"@timestamp": "yesterday", "ecs.version": "9.0.0", "log.level": "info", "message": ""}',
        '{"@timestamp": "2026-01-01T00:00:00Z", "ecs.version": "9.0.0", "log.level": "info", "message": 1}',
    ],
)
def test_the_check_of_lines_finds_what_is_wrong(line: str) -> None:
    with pytest.raises((AssertionError, ValueError)):
        check_line(line)
