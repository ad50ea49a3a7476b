"""This server beside what people would pick instead, with wrk, on one machine in one run; then overload and stopping.

    python -m benchmarks.serving --run EXPERIMENTS/benchmark/notebook --run EXPERIMENTS/benchmark/fast

Each run must be published. Needs wrk and hey. The servers take turns, several times, and the medians are compared. The
other servers get environments of their own below the user's cache folder, once. Every server must give the same classes
on the same images before it is measured. Writes benchmarks/results/serving.json and the tables in docs/serving.md that
come from it; `--only tables` writes these alone.
"""

from __future__ import annotations

import argparse
import base64
import csv
import hashlib
import json
import os
import re
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
import venv
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.measure import PROJECT, load_result, save_result
from image_classifier.choices import ServingPrecision
from image_classifier.imaging import decode_image
from image_classifier.published.folder import INT8_MODEL, MODEL
from image_classifier.published.predictor import Predictor, load_predictor

CONNECTIONS = (1, 8, 32, 128)
NUM_CHECKED = 1000
OVERLOAD_S = 30
QUEUES = (1024, 128)
"""The default, which holds all of the overload's 512 clients, and one that does not."""

PRECISIONS: dict[ServingPrecision, str] = {"fp32": MODEL, "int8": INT8_MODEL}
KEY = "benchmark"
DOCUMENT = PROJECT / "docs" / "serving.md"
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "image_classifier-benchmarks"
CORES = len(os.sched_getaffinity(0))


@dataclass(frozen=True)
class Body:
    """What is sent for an image."""

    content_type: str
    build: Callable[[bytes], bytes]


def encode_png(pixels: bytes) -> bytes:
    """Encode 3,072 bytes of pixels as PNG."""
    return encode(pixels, "PNG")


def encode(pixels: bytes, image_format: str) -> bytes:
    """Encode 3,072 bytes of pixels as an image file."""
    import io

    from PIL import Image

    buffer = io.BytesIO()
    Image.frombytes("RGB", (32, 32), pixels).save(buffer, image_format, quality=90)
    return buffer.getvalue()


def wrap_form(pixels: bytes) -> bytes:
    """Wrap a PNG into a form, as a browser does."""
    head = b'--x\r\nContent-Disposition: form-data; name="file"; filename="a.png"\r\nContent-Type: image/png\r\n\r\n'
    return head + encode_png(pixels) + b"\r\n--x--\r\n"


def wrap_json(name: str, is_list: bool = False) -> Callable[[bytes], bytes]:
    """Build what wraps pixels into JSON."""

    def wrap(pixels: bytes) -> bytes:
        text = base64.b64encode(pixels).decode()
        return json.dumps({name: [text] if is_list else text}).encode()

    return wrap


RAW = Body("application/octet-stream", bytes)


@dataclass(frozen=True)
class Server:
    """A server that is measured.

    Attributes:
        requirements: what is installed for it; none for this project's own environment.
        command: from the paths of interpreter, run and model, and the port, to the words that start it.
    """

    title: str
    body: Body
    path: str
    requirements: tuple[str, ...]
    command: Callable[[Path, Path, int], list[str]]
    with_project: bool = False


def build_own_command(python: Path, run: Path, port: int, *options: str) -> list[str]:
    """Build the words that start this project's server, with keys, limits, metrics and log as shipped."""
    keys = CACHE / "keys"
    keys.parent.mkdir(parents=True, exist_ok=True)
    keys.write_text(f"benchmark:{hashlib.sha256(KEY.encode()).hexdigest()}\n")
    words = [str(python), "-m", "image_classifier", "serve", str(run / "published"), "--port", str(port)]
    return [*words, "--api_keys_file", str(keys), "--drain_s", "0", *options]


def build_ablated_command(without: str, python: Path, run: Path, port: int) -> list[str]:
    """Build the words that start this project's server without one of its special ways."""
    *_, keys, _, _ = build_own_command(python, run, port)
    words = [str(python), "-m", "benchmarks.peers.own_server", str(run / "published"), str(port), keys]
    return [*words, "--without", without]


ABLATIONS = {
    "protocol": "stock uvicorn, one plain route with the same batcher, 3,072-byte body",
    "short_way": "this server without the short way of one small image",
    "event_loop": "this server without computing on the event loop",
}
"""What is taken out of this server, and what is left."""

PEERS = PROJECT / "benchmarks" / "peers"
RUNTIME = ("onnxruntime==1.31.1", "numpy==2.4.6")
SERVERS = {
    "own": Server("this server, 3,072-byte body", RAW, "/predict", (), build_own_command),
    **{
        f"without_{name}": Server(title, RAW, "/predict", (), partial(build_ablated_command, name))
        for name, title in ABLATIONS.items()
    },
    "mosec": Server(
        "mosec 0.9.8, batches of 64, wait 2 ms, 3,072-byte body",
        RAW,
        "/inference",
        ("mosec==0.9.8", *RUNTIME),
        lambda python, run, port: [
            str(python),
            str(PEERS / "mosec_server.py"),
            "--port",
            str(port),
            "--timeout",
            "60000",
        ],
    ),
    "litserve": Server(
        "LitServe 0.2.19, batches of 32, JSON with base64",
        Body("application/json", wrap_json("image")),
        "/predict",
        ("litserve==0.2.19", *RUNTIME),
        lambda python, run, port: [str(python), str(PEERS / "litserve_server.py")],
    ),
    "fastapi": Server(
        "FastAPI as tutorials write it: multipart PNG, Pillow, torch in eager mode",
        Body("multipart/form-data; boundary=x", wrap_form),
        "/predict",
        ("fastapi", "uvicorn[standard]", "python-multipart"),
        lambda python, run, port: [
            *(str(python), "-m", "uvicorn", "benchmarks.peers.plain_fastapi:app"),
            *("--port", str(port), "--log-level", "warning"),
        ],
        with_project=True,
    ),
    "bentoml": Server(
        "BentoML 1.4.39, adaptive batching of 32, JSON with base64",
        Body("application/json", wrap_json("images", is_list=True)),
        "/predict",
        ("bentoml==1.4.39", *RUNTIME),
        lambda python, run, port: [
            *(str(python.with_name("bentoml")), "serve", "bentoml_service:Classifier"),
            *("--port", str(port), "--working-dir", str(PEERS)),
        ],
    ),
}


def make_environment(name: str, server: Server) -> Path:
    """Make the environment of a server, unless it is there, and return its interpreter."""
    if not server.requirements:
        return Path(sys.executable)
    key = hashlib.sha256(repr((server.requirements, sys.version)).encode()).hexdigest()[:12]
    folder = CACHE / f"{name}-{key}"
    python = folder / "bin" / "python"
    if not (folder / "done").exists():
        shutil.rmtree(folder, ignore_errors=True)
        venv.create(folder, with_pip=True)
        pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, *server.requirements], check=True)
        if server.with_project:  # it is the network's torch that is measured, and there is one of it
            (site,) = folder.glob("lib/python*/site-packages")
            own = next(path for path in sys.path if path.endswith("site-packages"))
            (site / "project.pth").write_text(f"{own}\n{PROJECT}\n")
        (folder / "done").touch()
    return python


@contextmanager
def serving(
    name: str, run: Path, *options: str, project: Path = PROJECT
) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """Run a checkout's server in a session of its own until the block ends; yield process and port when it answers."""
    server = SERVERS[name]
    python = make_environment(name, server)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    words = server.command(python, run, port) + list(options)
    variables = {"PEER_RUN": run, "PEER_MODEL": run / "published" / "model.onnx", "PEER_PORT": port}
    environment = os.environ | {key: str(value) for key, value in variables.items()} | {"PEER_THREADS": str(CORES)}
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(words, cwd=project, env=environment, stdout=log, stderr=log, start_new_session=True)
        try:
            deadline = time.monotonic() + 90
            while True:
                try:
                    ask(name, port, bytes(3072))
                    break
                except OSError as error:
                    if process.poll() is not None or time.monotonic() > deadline:
                        log.seek(0)
                        sys.exit(f"{' '.join(words)}\n{log.read().decode()[-3000:]}\n{error}")
                    time.sleep(0.02)
            yield process, port
        finally:
            if process.poll() is None:
                process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                pass
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
            process.wait()


def ask(name: str, port: int, pixels: bytes) -> str:
    """Ask a server for the class of an image."""
    server = SERVERS[name]
    headers = {"Content-Type": server.body.content_type, "Authorization": f"Bearer {KEY}"}
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}{server.path}", data=server.body.build(pixels), headers=headers
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        document = json.loads(answer.read())
    if isinstance(document, list):
        return str(document[0])
    return str(document["predictions"][0]["class"] if "predictions" in document else document["class"])


def load_images(run: Path) -> list[bytes]:
    """Load the first test images of the run's data: 3,072 bytes each."""
    from image_classifier.data.dataset import load_snapshot
    from image_classifier.tracking.reading import read_record

    images, _ = load_snapshot(Path(read_record(run)["execution"]["dataset_folder"])).test
    pixels = np.ascontiguousarray(np.asarray(images[:NUM_CHECKED]).transpose(0, 2, 3, 1))
    return [image.tobytes() for image in pixels]


def check_classes(name: str, port: int, run: Path, images: Sequence[bytes]) -> int:
    """Count the images of which a server gives another class than the model; more than a few void the comparison."""
    predictor = load_predictor(run / "published")
    shares = predictor.predict(np.frombuffer(b"".join(images), np.uint8).reshape(-1, 32, 32, 3))
    expected = [predictor.model.classes[best] for best in shares.argmax(axis=1)]
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda pixels: ask(name, port, pixels), images))
    return sum(answer != best for answer, best in zip(answers, expected, strict=True))


SCRIPT = """
wrk.method = "POST"
wrk.headers["Content-Type"] = "{content_type}"
wrk.headers["Authorization"] = "Bearer {key}"
local file = io.open("{body}", "rb")
wrk.body = file:read("*a")
done = function(summary, latency, requests)
  local errors = summary.errors
  io.write(string.format("RESULT %d %d %d %d %d %d %d\\n", summary.requests, summary.duration,
    latency:percentile(50), latency:percentile(95), latency:percentile(99), errors.status,
    errors.connect + errors.read + errors.write + errors.timeout))
end
"""


def load_with_wrk(
    port: int, path: str, body: Body, pixels: bytes, connections: int, seconds: float
) -> dict[str, float]:
    """Ask a server as fast as it answers; requests a second that were answered with 200, and percentiles in ms."""
    with tempfile.TemporaryDirectory() as scratch:
        (Path(scratch) / "body").write_bytes(body.build(pixels))
        script = SCRIPT.format(content_type=body.content_type, key=KEY, body=f"{scratch}/body")
        (Path(scratch) / "post.lua").write_text(script)
        words = ["wrk", "--threads", "1", "--connections", str(connections), "--duration", f"{seconds:g}s"]
        words += ["--timeout", "30s", "--script", f"{scratch}/post.lua", f"http://127.0.0.1:{port}{path}"]
        output = subprocess.run(words, check=True, capture_output=True, text=True).stdout
    found = re.search(r"RESULT (\d+) (\d+) (\d+) (\d+) (\d+) (\d+) (\d+)", output)
    assert found is not None, output
    requests, duration, p50, p95, p99, refused, broken = map(int, found.groups())
    return {
        "requests_per_second": round((requests - refused) / (duration / 1e6), 1),
        "p50_ms": p50 / 1e3,
        "p95_ms": p95 / 1e3,
        "p99_ms": p99 / 1e3,
        "refused": refused,
        "broken": broken,
    }


def list_processes(leader: int) -> list[int]:
    """List a process and all that descend from it, also where they have sessions of their own."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
        except OSError:  # it has ended
            continue
    found = {leader}
    while more := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= more
    return sorted(found)


def measure_processes(leader: int) -> dict[str, float]:
    """Measure a process and its descendants: processor seconds so far, and the sum of each one's peak of memory."""
    seconds = megabytes = 0.0
    for pid in list_processes(leader):
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            peak = re.search(r"VmHWM:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())
        except OSError:
            continue
        seconds += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
        megabytes += int(peak[1]) / 1024 if peak else 0
    return {"cpu_seconds": seconds, "memory_mb": round(megabytes, 1)}


def measure_server(name: str, run: Path, images: Sequence[bytes], seconds: float) -> dict[str, Any]:
    """Measure one server with one network at every number of connections."""
    server = SERVERS[name]
    with serving(name, run) as (process, port):
        differing = check_classes(name, port, run, images)
        if differing > len(images) / 100:
            sys.exit(f"{name} gives other classes for {differing} of {len(images)} images: nothing to compare")
        rows = {}
        for connections in CONNECTIONS:
            before = measure_processes(process.pid)["cpu_seconds"]
            row = load_with_wrk(port, server.path, server.body, images[0], connections, seconds)
            spent = measure_processes(process.pid)["cpu_seconds"] - before
            row["cpu_seconds_per_1000"] = round(spent / max(1.0, row["requests_per_second"] * seconds) * 1000, 3)
            rows[str(connections)] = row
        memory = measure_processes(process.pid)["memory_mb"]
    return {"title": server.title, "differing_classes": differing, "memory_mb": memory, "connections": rows}


def measure_runtime(run: Path, seconds: float) -> dict[str, dict[str, float]]:
    """Measure ONNX Runtime alone, in process, by batch size: all cores at one batch, and a batch on each core."""
    rates: dict[str, dict[str, float]] = {}
    for precision in PRECISIONS:
        if not (run / "published" / PRECISIONS[precision]).exists():
            continue
        for way, num_threads, num_callers in (("all cores at one batch", CORES, 1), ("a batch a core", 1, CORES)):
            predictor = load_predictor(run / "published", precision=precision, num_threads=num_threads)
            rates[f"{precision}, {way}"] = {
                str(size): round(count_images(predictor, size, num_callers, seconds), 1) for size in (1, 8, 16, 32, 64)
            }
    return rates


def count_images(predictor: Predictor, batch_size: int, num_callers: int, seconds: float) -> float:
    """Count the images a second that a model computes for so many callers at once."""
    images = np.random.default_rng(0).integers(0, 256, (batch_size, 32, 32, 3), dtype=np.uint8)
    predictor.predict(images)
    end = time.perf_counter() + seconds

    def call() -> int:
        number = 0
        while time.perf_counter() < end:
            predictor.predict(images)
            number += batch_size
        return number

    began = time.perf_counter()
    with ThreadPoolExecutor(num_callers) as pool:
        calls = [pool.submit(call) for _ in range(num_callers)]
        total = sum(each.result() for each in calls)
    return total / (time.perf_counter() - began)


def measure_int8(run: Path, images: Sequence[bytes], seconds: float) -> dict[str, Any] | None:
    """Measure this server with the int8 network, where one was published."""
    if not (run / "published" / PRECISIONS["int8"]).exists():
        return None
    with serving("own", run, "--precision", "int8") as (_, port):
        return {str(number): load_with_wrk(port, "/predict", RAW, images[0], number, seconds) for number in CONNECTIONS}


def measure_bodies(run: Path, images: Sequence[bytes], seconds: float) -> dict[str, Any]:
    """Measure what image files cost beside bare pixels, and decoding alone."""
    result: dict[str, Any] = {}
    with serving("own", run) as (_, port):
        for kind in ("PNG", "JPEG"):
            body = Body(f"image/{kind.lower()}", partial(encode, image_format=kind))
            result[kind] = load_with_wrk(port, "/predict", body, images[0], 32, seconds)
    for kind in ("PNG", "JPEG"):
        content = encode(images[0], kind)
        began, number = time.perf_counter(), 0
        while (spent := time.perf_counter() - began) < min(1.0, seconds):
            decode_image(content)
            number += 1
        result[kind]["decoded_per_second_on_one_thread"] = round(number / spent, 1)
    return result


def measure_start(run: Path) -> dict[str, float]:
    """Measure the seconds from the command to the first answer."""
    began = time.perf_counter()
    with serving("own", run):
        return {"seconds": round(time.perf_counter() - began, 3)}


def read_counts(port: int, name: str) -> dict[str, float]:
    """Read one of the server's counters with one label: its count by the label's value."""
    request = urllib.request.Request(f"http://127.0.0.1:{port}/metrics", headers={"Authorization": f"Bearer {KEY}"})
    with urllib.request.urlopen(request, timeout=30) as answer:
        text = answer.read().decode()
    found = re.findall(rf'image_classifier_{name}_total\{{\w+="([^"]+)"\}} ([\d.e+]+)', text)
    return {value: float(count) for value, count in found}


def load_with_hey(port: int, pixels: bytes, clients: int, rate: float, seconds: float) -> list[tuple[int, float]]:
    """Ask at a fixed rate, whatever the answers; return the status and the seconds of each."""
    with tempfile.TemporaryDirectory() as scratch:
        (Path(scratch) / "body").write_bytes(pixels)
        words = ["hey", "-z", f"{seconds:g}s", "-c", str(clients), "-q", f"{rate / clients:.3f}", "-m", "POST"]
        words += ["-T", RAW.content_type, "-H", f"Authorization: Bearer {KEY}", "-D", f"{scratch}/body", "-o", "csv"]
        output = subprocess.run(
            [*words, f"http://127.0.0.1:{port}/predict"], check=True, capture_output=True, text=True
        ).stdout
    return [(int(row["status-code"]), float(row["response-time"])) for row in csv.DictReader(output.splitlines())]


def measure_overload(run: Path, images: Sequence[bytes], seconds: float, queue: int) -> dict[str, Any]:
    """Measure a server that is asked three times as often as it can answer, for 30 s."""
    clients = 512
    with serving("own", run, "--max_queue", str(queue)) as (_, port):
        before = load_with_wrk(port, "/predict", RAW, images[0], 64, seconds)
        asked = 3 * before["requests_per_second"]
        answers = load_with_hey(port, images[0], clients, asked, OVERLOAD_S)
        began = time.perf_counter()
        ask("own", port, images[0])
        recovered = time.perf_counter() - began
        after = load_with_wrk(port, "/predict", RAW, images[0], 64, seconds)
        rejections = read_counts(port, "rejected")
    good = [spent for status, spent in answers if status == 200]
    return {
        "queue": queue,
        "clients": clients,
        "before": before,
        "asked_per_second": round(asked, 1),
        "sent_per_second": round(len(answers) / OVERLOAD_S, 1),
        "good_per_second": round(len(good) / OVERLOAD_S, 1),
        "statuses": dict(Counter(str(status) for status, _ in answers)),
        "p99_of_accepted_ms": round(float(np.percentile(good, 99)) * 1e3, 1),
        "first_answer_after_s": round(recovered, 4),
        "after": after,
        "rejections": rejections,
    }


class Clients:
    """Clients that ask again and again, each on its own connection, and count what went wrong."""

    def __init__(self, port: int, pixels: bytes, number: int) -> None:
        self.answered = self.lost = 0
        self._lock = threading.Lock()
        head = f"POST /predict HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {KEY}\r\nContent-Length: 3072\r\n"
        self._request = head.encode() + b"Content-Type: application/octet-stream\r\n\r\n" + pixels
        self._port = port
        self.threads = [threading.Thread(target=self._ask, daemon=True) for _ in range(number)]
        for thread in self.threads:
            thread.start()

    def _ask(self) -> None:
        while True:
            try:
                connection = socket.create_connection(("127.0.0.1", self._port), timeout=30)
            except OSError:
                return  # nobody listens any more
            with connection:
                is_open = True
                while is_open:
                    try:
                        connection.sendall(self._request)
                        answer = connection.recv(65536)
                    except OSError:
                        answer = b""
                    with self._lock:
                        self.answered += answer.startswith(b"HTTP/1.1 200")
                        self.lost += not answer.startswith(b"HTTP/1.1 200")
                    if not answer:
                        return
                    is_open = b"connection: close" not in answer


def measure_stop(run: Path, images: Sequence[bytes]) -> dict[str, Any]:
    """Measure SIGTERM under load: what was lost, and how long it took."""
    with serving("own", run, "--drain_s", "1") as (process, port):
        clients = Clients(port, images[0], 32)
        time.sleep(2)
        began = time.perf_counter()
        process.terminate()
        status = process.wait(60)
        seconds = time.perf_counter() - began
        for thread in clients.threads:
            thread.join(30)
    return {"answered": clients.answered, "lost": clients.lost, "exit_status": status, "seconds": round(seconds, 2)}


def measure_hostile_clients(run: Path, images: Sequence[bytes], seconds: float) -> dict[str, Any]:
    """Measure what others get while 200 clients leave before their answer, and while 200 send their heads slowly."""
    head = f"POST /predict HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {KEY}\r\nContent-Length: 3072\r\n"
    request = head.encode() + b"Content-Type: application/octet-stream\r\n\r\n" + images[0]
    with serving("own", run, "--header_timeout_s", "2") as (_, port):
        alone = load_with_wrk(port, "/predict", RAW, images[0], 32, seconds)
        for _ in range(200):
            with socket.create_connection(("127.0.0.1", port)) as connection:
                connection.sendall(request)
        left = load_with_wrk(port, "/predict", RAW, images[0], 32, seconds)
        slow = [socket.create_connection(("127.0.0.1", port)) for _ in range(200)]
        for connection in slow:
            connection.sendall(b"POST /predict HTTP/1.1\r\nHo")
        meanwhile = load_with_wrk(port, "/predict", RAW, images[0], 32, seconds)
        time.sleep(3)
        closed = 0
        for connection in slow:
            connection.settimeout(5)
            closed += connection.recv(4096)[:12] in (b"HTTP/1.1 408", b"")
            connection.close()
        rejections = read_counts(port, "rejected")
    return {
        "alone": alone,
        "after_200_that_left": left,
        "beside_200_slow_heads": meanwhile,
        "slow_heads_closed": closed,
        "rejections": rejections,
    }


def take_median(rows: Sequence[Any]) -> Any:
    """Take the median of each number in results of the same shape; a rate's smallest and largest value stay, too."""
    first = rows[0]
    if isinstance(first, dict):
        median = {key: take_median([row[key] for row in rows]) for key in first}
        if "requests_per_second" in first:
            rates = [row["requests_per_second"] for row in rows]
            median["spread"] = [min(rates), max(rates)]
        return median
    return statistics.median(rows) if isinstance(first, (int, float)) else first


def measure_all(runs: Mapping[str, Path], names: Sequence[str], seconds: float, rounds: int) -> dict[str, Any]:
    """Measure every server with every network, in turn, and then this one under what it should withstand."""
    result = load_result("serving")
    load = list(os.getloadavg())  # of others, who would be in every figure
    result = {
        "seconds_a_measurement": seconds,
        "rounds": rounds,
        "load_average_before": load,
        "networks": result.get("networks", {}),
    }
    for network, run in runs.items():
        images = load_images(run)
        facts = result["networks"].setdefault(network, {"servers": {}})
        alone = []
        rows: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
        for _ in range(rounds):
            alone.append(measure_runtime(run, min(1.0, seconds)))
            for name in names:
                rows[name].append(row := measure_server(name, run, images, seconds))
                rates = {key: value["requests_per_second"] for key, value in row["connections"].items()}
                print(network, name, rates, flush=True)
        facts["onnxruntime_alone"] = take_median(alone)
        facts["servers"] |= {name: take_median(each) for name, each in rows.items()}
        if "own" in names:
            facts["bodies"] = measure_bodies(run, images, seconds)
            facts["int8"] = measure_int8(run, images, seconds)
            facts["start"] = measure_start(run)
            facts["overload"] = [measure_overload(run, images, seconds, queue) for queue in QUEUES]
            facts["stop"] = measure_stop(run, images)
            facts["clients"] = measure_hostile_clients(run, images, seconds)
    return result


def build_tables(result: Mapping[str, Any]) -> str:
    """Build the tables of docs/serving.md."""
    parts = []
    for network, facts in result["networks"].items():
        lines = [
            f"### {network}",
            "",
            "| server, fastest request format | requests/s at 1 · 8 · 32 · 128 connections | range at 32 | p99 ms | "
            "CPU seconds per 1,000 at 32 | memory MB |",
            "|---|---|---|---|---|---|",
        ]
        for row in (facts["servers"][name] for name in SERVERS if name in facts["servers"]):
            rows = row["connections"].values()
            rates = " · ".join(f"{each['requests_per_second']:,.0f}" for each in rows)
            tails = " · ".join(f"{each['p99_ms']:.1f}" for each in rows)
            middle = row["connections"]["32"]
            spread = " to ".join(f"{rate:,.0f}" for rate in middle["spread"])
            cpu = f"{middle['cpu_seconds_per_1000']:.2f}"
            lines.append(f"| {row['title']} | {rates} | {spread} | {tails} | {cpu} | {row['memory_mb']:.0f} |")
        lines += ["", "| ONNX Runtime alone, in process | images/s in batches of 1 · 8 · 16 · 32 · 64 |", "|---|---|"]
        for way, rates in facts["onnxruntime_alone"].items():
            lines.append(f"| {way} | {' · '.join(f'{rate:,.0f}' for rate in rates.values())} |")
        lines.append("")
        if "overload" in facts:
            lines += [_describe_endurance(facts), ""]
        parts.append("\n".join(lines))
    where = f"{result['processor']}, {result['cores']} cores, commit {result['commit'][:12]}"
    how = f"{result['rounds']} turns of {result['seconds_a_measurement']:g} s each, medians, load from the same cores"
    busy = result["load_average_before"][0]
    if busy > 0.5:
        how += f"; load average before: {busy:.1f}. Compare only figures of the same run"
    return "\n".join([*parts, f"Measured by `python -m benchmarks.serving` on {where}; {how}.", ""])


def _describe_endurance(facts: Mapping[str, Any]) -> str:
    overload, stop, clients, bodies, int8 = (facts[name] for name in ("overload", "stop", "clients", "bodies", "int8"))

    def count(row: Mapping[str, float]) -> str:
        return f"{row['requests_per_second']:,.0f}"

    decoded = {kind: f"{row['decoded_per_second_on_one_thread']:,.0f}" for kind, row in bodies.items()}
    lines = [
        f"- PNG bodies {count(bodies['PNG'])}/s and JPEG {count(bodies['JPEG'])}/s at 32 connections (one thread "
        f"decodes {decoded['PNG']} and {decoded['JPEG']}).",
        f"- Time from the command to the first answer: {facts['start']['seconds']:.2f} s.",
        f"- SIGTERM under the load of 32 clients: {stop['answered']:,} answered, {stop['lost']} lost, exit status "
        f"{stop['exit_status']}.",
        f"- After 200 clients disconnected early: {count(clients['after_200_that_left'])} requests/s. Beside 200 "
        f"clients "
        f"that send their headers slowly: {count(clients['beside_200_slow_heads'])} (alone: "
        f"{count(clients['alone'])}); "
        f"the server closed {clients['slow_heads_closed']} of these connections.",
    ]
    if int8:
        rates = " · ".join(count(row) for row in int8.values())
        lines.insert(1, f"- With `--precision int8` {rates} requests/s at 1 · 8 · 32 · 128 connections.")
    lines += [
        "",
        f"{OVERLOAD_S} s of overload, three times the server's capacity: {overload[0]['clients']} closed-loop clients. "
        f"Each "
        "sends its next request when the last one is answered or refused:",
        "",
        "| `--max_queue` | requests/s sent | requests/s answered with 200 | their p99, ms | answers by status | "
        "requests/s "
        "of 64 clients before, after | first answer after the overload, ms |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in overload:
        statuses = ", ".join(f"{status}: {number:,}" for status, number in sorted(row["statuses"].items()))
        lines.append(
            f"| {row['queue']:,} | {row['sent_per_second']:,.0f} | {row['good_per_second']:,.0f} | "
            f"{row['p99_of_accepted_ms']:.0f} | {statuses} | {count(row['before'])}, {count(row['after'])} | "
            f"{row['first_answer_after_s'] * 1000:.0f} |"
        )
    return "\n".join(lines)


def write_tables() -> None:
    """Put the tables into docs/serving.md."""
    marks = ("<!-- from benchmarks/results/serving.json -->\n", "<!-- end -->\n")
    before, _, rest = DOCUMENT.read_text(encoding="utf-8").partition(marks[0])
    _, _, after = rest.partition(marks[1])
    tables = build_tables(load_result("serving"))
    if soak := load_result("soak"):
        tables += "\n" + describe_soak(soak)
    DOCUMENT.write_text(before + marks[0] + tables + marks[1] + after, encoding="utf-8")


def describe_soak(soak: Mapping[str, Any]) -> str:
    """Describe the hour at 70 % of the load, in a sentence."""
    statuses = ", ".join(f"{status}: {number:,}" for status, number in soak["answered_predictions"].items())
    errors = "; ".join(" ".join(text.split()) for text in soak["errors"]) or "none"
    first, second, most = (soak[f"memory_mb_{name}"] for name in ("first_half", "second_half", "most"))
    return (
        f"`python -m benchmarks.soak`, {soak['seconds'] / 60:.0f} minutes: {soak['asked_per_second']:,.0f} requests "
        f"per "
        f"second, of a capacity of {soak['capacity_per_second']:,.0f}. "
        f"Answers by status: {statuses}; errors: {errors}; p50 {soak['p50_ms']:.1f} ms, p99 {soak['p99_ms']:.1f} ms. "
        f"In between, {soak['disturbances']:,} times an image file, a broken file, and an early disconnect. Memory "
        f"{first:.0f} MB in the first half, {second:.0f} MB in the second, {most:.0f} MB at most.\n"
    )


def main() -> None:
    """Measure, save, and write the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--run", type=Path, action="append", required=False, default=[], help="a published run")
    parser.add_argument("--seconds", type=float, default=5, help="of each measurement")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each server")
    parser.add_argument("--only", nargs="*", choices=[*SERVERS, "tables"], default=list(SERVERS))
    arguments = parser.parse_args()
    names = [name for name in arguments.only if name != "tables"]
    if names:
        runs = {run.resolve().name: run.resolve() for run in arguments.run}
        save_result("serving", measure_all(runs, names, arguments.seconds, arguments.rounds))
    write_tables()


if __name__ == "__main__":
    main()
