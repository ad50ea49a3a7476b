"""A server process, real sockets to talk to it, and images that are none: what the tests of serving share."""

from __future__ import annotations

import io
import json
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from image_classifier.published.folder import MANIFEST, MODEL, REFERENCE, describe_content, serialize_manifest
from image_classifier.published.predictor import build_predictor
from image_classifier.published.reference import build_reference, serialize_reference
from tests.conftest import PROJECT, find_port

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
PIXELS = {"content-type": "application/octet-stream"}


def write_model(
    path: Path,
    *,
    seed: int = 0,
    classes: Sequence[str] = CLASSES,
    width: int = 0,
    side: int = 32,
    fails_on_white: bool = False,
) -> Path:
    """Write an ONNX file as `publish` does, of a network with random weights.

    Args:
        width: channels of a convolution in front, which makes it slow; 0 for a linear network that takes no time.
        side: in pixels, of the images that it takes.
        fails_on_white: it cannot be computed where a value is 255.
    """
    generator = np.random.default_rng(seed)

    def draw(name: str, *shape: int) -> Any:
        weights = generator.normal(0, float(np.prod(shape[:-1])) ** -0.5, shape).astype(np.float32)
        return numpy_helper.from_array(weights, name)

    scale = numpy_helper.from_array(np.array(1 / 64, np.float32), "scale")
    nodes = [helper.make_node("Cast", ["images"], ["float"], to=TensorProto.FLOAT)]
    nodes.append(helper.make_node("Mul", ["float", "scale"], ["scaled"]))
    weights = [scale]
    last = "scaled"
    if width:
        weights += [draw("kernel", width, 3, 3, 3), draw("kernel2", width, width, 3, 3)]
        nodes.append(helper.make_node("Transpose", ["scaled"], ["planes"], perm=[0, 3, 1, 2]))
        nodes.append(helper.make_node("Conv", ["planes", "kernel"], ["first"], pads=[1] * 4))
        nodes.append(helper.make_node("Conv", ["first", "kernel2"], ["second"], pads=[1] * 4))
        nodes.append(helper.make_node("AveragePool", ["second"], ["pooled"], kernel_shape=[8, 8], strides=[8, 8]))
        last = "pooled"
    nodes.append(helper.make_node("Flatten", [last], ["flat"]))
    weights.append(draw("matrix", width * (side // 8) ** 2 if width else 3 * side**2, len(classes)))
    nodes.append(helper.make_node("MatMul", ["flat", "matrix"], ["logits"]))
    last = "logits"
    if fails_on_white:
        weights.append(numpy_helper.from_array(np.zeros(255, np.float32), "nothing"))
        nodes.append(helper.make_node("ReduceMax", ["float"], ["largest"], keepdims=0))
        nodes.append(helper.make_node("Cast", ["largest"], ["index"], to=TensorProto.INT64))
        nodes.append(helper.make_node("Gather", ["nothing", "index"], ["zero"]))  # of 255 values: none is the last
        nodes.append(helper.make_node("Add", ["logits", "zero"], ["same"]))
        last = "same"
    nodes.append(helper.make_node("Softmax", [last], ["probabilities"], axis=1))
    graph = helper.make_graph(
        nodes,
        "network",
        [helper.make_tensor_value_info("images", TensorProto.UINT8, ["N", side, side, 3])],
        [helper.make_tensor_value_info("probabilities", TensorProto.FLOAT, ["N", len(classes)])],
        weights,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    facts = {"classes": json.dumps(list(classes)), "experiment_name": "tests", "run_name": f"seed-{seed}"}
    facts |= {"data_digest": "0" * 64, "views": "one", "format_version": "1"}
    for name, value in facts.items():
        model.metadata_props.add(key=f"image_classifier.{name}", value=value)
    path.write_bytes(model.SerializeToString())
    return path


def write_published_model(folder: Path, images: NDArray[np.uint8], *, seed: int = 0, width: int = 0) -> Path:
    """Write a published folder with such a model, whose test set has these images [N, 32, 32, 3] often."""
    folder.mkdir()
    content = write_model(folder / MODEL, seed=seed, width=width).read_bytes()
    probabilities = build_predictor(content, folder, num_threads=1, is_signed=True).predict(images)
    images, probabilities = (np.concatenate([each] * 20) for each in (images, probabilities))
    reference = serialize_reference(build_reference(CLASSES, images.transpose(0, 3, 1, 2), probabilities))
    (folder / REFERENCE).write_bytes(reference)
    facts = {"format_version": 1, "experiment_name": "tests", "run_name": f"seed-{seed}", "data_digest": "0" * 64}
    described = {MODEL: describe_content(content), REFERENCE: describe_content(reference)}
    manifest = serialize_manifest({**facts, "classes": list(CLASSES), "files": described})
    (folder / MANIFEST).write_bytes(manifest)
    return folder


def draw_images(number: int, seed: int = 0, side: int = 32) -> NDArray[np.uint8]:
    """Draw images: uint8 [N, side, side, 3]."""
    return np.random.default_rng(seed).integers(0, 256, (number, side, side, 3), dtype=np.uint8)


def encode(pixels: NDArray[np.uint8], image_format: str = "PNG", **options: Any) -> bytes:
    """Encode an image."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, image_format, **options)
    return buffer.getvalue()


@dataclass
class Running:
    """A server process that is ready.

    Attributes:
        log: its stderr, in a file.
    """

    process: subprocess.Popen[bytes]
    url: str
    port: int
    log: Path

    def connect(self, timeout_s: float = 10) -> socket.socket:
        """Open a connection of our own, to send what no client would."""
        return socket.create_connection(("127.0.0.1", self.port), timeout=timeout_s)

    def read_metric(self, name: str, **labels: str) -> float:
        """Read a metric: the sum over all label sets that have these labels."""
        text = httpx.get(f"{self.url}/metrics").text
        values = re.findall(rf"^{name}(\{{[^}}]*\}})? ([\d.e+-]+)$", text, flags=re.MULTILINE)
        wanted = [f'{label}="{value}"' for label, value in labels.items()]
        return sum(float(value) for found, value in values if all(each in found for each in wanted))

    def measure_memory(self) -> float:
        """Measure the resident memory, in MB."""
        return self._read_memory("VmRSS")

    def measure_peak(self) -> float:
        """Measure the resident memory at its most, in MB."""
        return self._read_memory("VmHWM")

    def _read_memory(self, name: str) -> float:
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.findall(rf"{name}:\s+(\d+)", status)[0]) / 1024

    def stop(self, timeout_s: float = 60) -> int:
        """Send SIGTERM and return the exit status."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout_s)


@contextmanager
def serving(
    model: Path | str,
    log: Path,
    *options: str | Path,
    timeout_s: float = 60,
    program: Sequence[str] = ("-m", "image_classifier"),
    python: str | Path = sys.executable,
) -> Iterator[Running]:
    """Serve a model in a process of its own until the block ends; fail unless it becomes ready and ends well."""
    port = find_port()
    words = [python, *program, "serve", model, "--port", port, "--num_threads", 1]
    words += ["--drain_s", "0", *options]
    with open(log, "wb") as file:
        process = subprocess.Popen([str(word) for word in words], cwd=PROJECT, stdout=file, stderr=file)
    server = Running(process, f"http://127.0.0.1:{port}", port, log)
    try:
        wait_until_ready(server, timeout_s)
        yield server
    finally:
        if process.poll() is None:
            process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            raise


def wait_until_ready(server: Running, timeout_s: float = 60) -> None:
    """Wait until a server says that it is ready."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if server.process.poll() is not None:
            raise AssertionError(f"the server ended: {server.log.read_text()}")
        try:
            if httpx.get(f"{server.url}/health/ready", timeout=5).status_code == 200:
                return
        except httpx.TransportError:
            time.sleep(0.05)
    raise AssertionError(f"the server is not ready: {server.log.read_text()}")


class Answer(NamedTuple):
    """One HTTP answer; of status 0 where none came before the end of the connection."""

    status: int
    body: bytes
    is_last: bool


def read_answer(connection: socket.socket) -> Answer:
    """Read one HTTP answer off a connection."""
    content = b""
    while b"\r\n\r\n" not in content:
        part = connection.recv(65536)
        if not part:
            return Answer(0, content, True)
        content += part
    head, _, body = content.partition(b"\r\n\r\n")
    lengths = re.findall(rb"(?i)content-length: (\d+)", head)
    while lengths and len(body) < int(lengths[0]):
        part = connection.recv(65536)
        if not part:
            return Answer(0, body, True)
        body += part
    return Answer(int(head.split()[1]), body, b"connection: close" in head.lower())


def build_request(body: bytes, content_type: str = PIXELS["content-type"], path: str = "/predict") -> bytes:
    """Build the bytes of a POST."""
    head = f"POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-type: {content_type}\r\ncontent-length: {len(body)}\r\n"
    return head.encode() + b"\r\n" + body


def build_png_of(width: int, height: int) -> bytes:
    """Build a small PNG that claims to be, and decodes to, a large one-bit image."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    rows = zlib.compress(bytes((width + 7) // 8 + 1) * height, 9)
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def build_zip() -> bytes:
    """Build a zip file with an image in it."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        file.writestr("image.png", encode(draw_images(1)[0]))
    return buffer.getvalue()


def build_animation(image_format: str) -> bytes:
    """Build an animation of two frames."""
    first, second = (Image.fromarray(image) for image in draw_images(2))
    buffer = io.BytesIO()
    first.save(buffer, image_format, save_all=True, append_images=[second], duration=100)
    return buffer.getvalue()


class Clients:
    """Clients that ask again and again, each on connections of its own, until the server is gone.

    Attributes:
        answered: statuses of what was answered.
        lost: what went wrong with requests on connections that the server had accepted.
    """

    def __init__(self, server: Running, number: int) -> None:
        self.answered: list[int] = []
        self.lost: list[str] = []
        self._server = server
        self._is_over = threading.Event()
        self._threads = [threading.Thread(target=self._ask, args=(seed,), daemon=True) for seed in range(number)]
        for thread in self._threads:
            thread.start()

    def _ask(self, seed: int) -> None:
        request = build_request(draw_images(1, seed)[0].tobytes())
        while not self._is_over.is_set():
            try:
                connection = self._server.connect()
            except OSError:
                return  # it accepts no more
            with connection:
                while not self._is_over.is_set():
                    try:
                        connection.sendall(request)
                        answer = read_answer(connection)
                    except OSError as error:
                        self.lost.append(repr(error))
                        return
                    if answer.status == 0:
                        self.lost.append("no answer")
                        return
                    self.answered.append(answer.status)
                    if answer.is_last:
                        break

    def join(self) -> None:
        """Wait until all have noticed that the server is gone."""
        for thread in self._threads:
            thread.join(20)
            assert not thread.is_alive()

    def stop(self) -> None:
        """Let all end after their next answer."""
        self._is_over.set()
        self.join()
