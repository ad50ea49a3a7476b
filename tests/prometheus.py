"""A real Prometheus and a real Alertmanager with the files of docs/monitoring; minutes there are seconds here."""

from __future__ import annotations

import json
import re
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import yaml

from image_classifier.serving.telemetry import Metrics
from tests.conftest import PROJECT, find_port, require_program

FOLDER = PROJECT / "docs" / "monitoring"
WINDOW = "4s"
"""What ranges of the rules, 5 minutes to 1 hour, become."""


@dataclass
class Prometheus:
    """A Prometheus process, and what its alerts have told."""

    url: str
    told: list[dict[str, Any]] = field(default_factory=list)

    def query(self, expression: str) -> list[dict[str, Any]]:
        """Evaluate an expression now: the series with their labels and values."""
        answer = httpx.get(f"{self.url}/api/v1/query", params={"query": expression}, timeout=30).json()
        assert answer["status"] == "success", f"{expression}: {answer}"
        result: list[dict[str, Any]] = answer["data"]["result"]
        return result

    def list_firing(self) -> set[str]:
        """List the alerts that fire now."""
        alerts = httpx.get(f"{self.url}/api/v1/alerts", timeout=30).json()["data"]["alerts"]
        return {alert["labels"]["alertname"] for alert in alerts if alert["state"] == "firing"}

    def list_told(self, status: str) -> set[str]:
        """List the alerts that came out of Alertmanager as firing or as resolved."""
        return {alert["labels"]["alertname"] for alert in self.told if alert["status"] == status}


def wait_for(condition: Callable[[], bool], what: str, timeout_s: float = 30) -> None:
    """Wait until a condition holds."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout_s:g} s: {what}"
        time.sleep(0.1)


@contextmanager
def running(words: Sequence[str], log: Path, ready_url: str) -> Iterator[None]:
    """Run a program until the block ends, from when it says that it is ready."""
    with open(log, "wb") as file:
        process = subprocess.Popen(words, stdout=file, stderr=file)
    try:

        def is_ready() -> bool:
            assert process.poll() is None, log.read_text()
            try:
                return httpx.get(ready_url, timeout=5).status_code == 200
            except httpx.TransportError:
                return False

        wait_for(is_ready, f"{words[0]} answers")
        yield
    finally:
        process.terminate()
        process.wait(30)


@contextmanager
def receiving(alerts: list[dict[str, Any]]) -> Iterator[str]:
    """Receive what Alertmanager tells; yield the address for it."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            alerts.extend({**alert, "receiver": body["receiver"]} for alert in body["alerts"])
            self.send_response(200)
            self.end_headers()

        def log_message(self, *arguments: Any) -> None:
            """Say nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/"
        finally:
            server.shutdown()
            thread.join()


def quicken_rules(text: str) -> str:
    """Let rules look back for seconds, and wait for one."""
    text = re.sub(r"\[\d+[mh]\]", f"[{WINDOW}]", text)
    return re.sub(r"\bfor: \d+[mh]", "for: 1s", text)


def quicken_routes(config: dict[str, Any], address: str) -> dict[str, Any]:
    """Let Alertmanager tell at once, at an address."""
    quick = {"group_wait": "100ms", "group_interval": "500ms"}
    config["route"] |= quick
    for receiver in config["receivers"]:
        receiver["webhook_configs"] = [{"url": address, "send_resolved": True}]
    return config


@contextmanager
def watching(folder: Path, target: str, key_file: Path | None = None) -> Iterator[Prometheus]:
    """Have a target watched, as docker-compose.yaml does, until the block ends."""
    services = yaml.safe_load((PROJECT / "docker-compose.yaml").read_text())["services"]
    port, manager_port = find_port(), find_port()
    watched = Prometheus(f"http://127.0.0.1:{port}")
    with ExitStack() as stack:
        address = stack.enter_context(receiving(watched.told))
        routes = quicken_routes(yaml.safe_load((FOLDER / "alertmanager.yml").read_text()), address)
        (folder / "alertmanager.yml").write_text(yaml.safe_dump(routes))
        (folder / "alerts.yaml").write_text(quicken_rules((FOLDER / "alerts.yaml").read_text()))
        config = yaml.safe_load((FOLDER / "prometheus.yml").read_text())
        config["global"] = {"scrape_interval": "500ms", "evaluation_interval": "500ms"}
        (job,) = config["scrape_configs"]
        job["static_configs"] = [{"targets": [target]}]
        if key_file:
            job["authorization"] = {"credentials_file": str(key_file)}
        config["alerting"]["alertmanagers"][0]["static_configs"] = [{"targets": [f"127.0.0.1:{manager_port}"]}]
        (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
        for name, program, own_port in (
            ("alertmanager", "prometheus-alertmanager", manager_port),
            ("prometheus", "prometheus", port),
        ):
            places = {f"/etc/{name}/": f"{folder}/", f"=/{name}": f"={folder / name}"}
            words = [require_program(program), *services[name]["command"]]
            for place, own in places.items():
                words = [word.replace(place, own) for word in words]
            words.append(f"--web.listen-address=127.0.0.1:{own_port}")
            url = f"http://127.0.0.1:{own_port}"
            stack.enter_context(running(words, folder / f"{name}.log", f"{url}/-/ready"))
        yield watched


FUNCTIONS = {
    *("sum", "max", "by", "rate", "increase", "histogram_quantile", "absent", "count", "vector", "scalar", "ln"),
    *("avg_over_time", "le", "option", "reason", "result", "version", "http_response_status_code", "http_route"),
    *("class", "instance", "name", "run_name"),
}


def list_metrics() -> set[str]:
    """List the names under which the server's metrics can be asked for."""
    endings = {"histogram": ("_bucket", "_sum", "_count"), "counter": ("_total",), "gauge": ("",)}
    families = Metrics().registry.collect()
    return {family.name + ending for family in families for ending in endings.get(family.type, ("",))}


def list_names(expression: str) -> set[str]:
    """List the metrics that an expression asks for."""
    bare = re.sub(r"\{[^}]*\}|\[[^\]]*\]|\"[^\"]*\"", "", expression)
    return set(re.findall(r"\b[a-z_]{3,}\b", bare)) - FUNCTIONS
