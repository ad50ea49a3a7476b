"""The Open Inference Protocol, version 2, with the extension for binary tensors: for clients of KServe and Triton."""

from __future__ import annotations

import asyncio
import itertools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import orjson
from numpy.typing import NDArray
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from image_classifier import __version__
from image_classifier.imaging import SIDE
from image_classifier.published.predictor import INPUT, OUTPUT
from image_classifier.serving.batching import NUM_BYTES, Ticket
from image_classifier.serving.problems import Problem

if TYPE_CHECKING:
    from image_classifier.serving.app import App

HEADER_LENGTH = "inference-header-content-length"
MAX_LABELS = 1000


def build_routes(app: App) -> list[Route]:
    """Build the routes below `/v2` for an application."""
    endpoint = _Endpoint(app)
    model = "/v2/models/{model}"
    version = f"{model}/versions/{{version}}"
    return [
        Route("/v2", endpoint.describe_server),
        Route("/v2/health/live", endpoint.show_live),
        Route("/v2/health/ready", endpoint.show_ready),
        *(Route(path, endpoint.describe_model) for path in (model, version)),
        *(Route(f"{path}/ready", endpoint.show_model_ready) for path in (model, version)),
        *(Route(f"{path}/infer", endpoint.infer, methods=["POST"]) for path in (model, version)),
    ]


class _Endpoint:
    def __init__(self, app: App) -> None:
        self._app = app

    async def describe_server(self, request: Request) -> Response:
        return _answer({"name": "image_classifier", "version": __version__, "extensions": ["binary_tensor_data"]})

    async def show_live(self, request: Request) -> Response:
        return _answer({"live": True})

    async def show_ready(self, request: Request) -> Response:
        is_ready = self._app.is_ready
        return _answer({"ready": is_ready}, 200 if is_ready else 503)

    async def show_model_ready(self, request: Request) -> Response:
        self._check_model(request)
        is_ready = self._app.is_ready
        return _answer({"name": self._app.name, "ready": is_ready}, 200 if is_ready else 503)

    async def describe_model(self, request: Request) -> Response:
        self._check_model(request)
        model = self._app.batcher.classifier.model
        inputs = [{"name": INPUT, "datatype": "UINT8", "shape": [-1, SIDE, SIDE, 3]}]
        outputs = [{"name": OUTPUT, "datatype": "FP32", "shape": [-1, len(model.classes)]}]
        facts = {"name": self._app.name, "versions": [model.version], "platform": "onnxruntime_onnx"}
        return _answer({**facts, "inputs": inputs, "outputs": outputs})

    async def infer(self, request: Request) -> Response:
        self._check_model(request)
        body = await self._app.read_request(request)
        if request.headers.get("content-encoding", "identity") != "identity":
            raise Problem("unsupported-media-type", "bodies are taken as they are, without Content-Encoding")
        length = request.headers.get(HEADER_LENGTH)
        document, images = await asyncio.to_thread(parse_infer, body, length, self._app.settings.max_images)
        pixels = images.tobytes()
        tickets = [Ticket(pixels[start : start + NUM_BYTES]) for start in range(0, len(pixels), NUM_BYTES)]
        tickets = await self._app.compute(tickets, request.scope.get("connection"))
        model = tickets[0].classifier.model
        rows = np.array([ticket.row for ticket in tickets], np.float32)
        answer = {"model_name": self._app.name, "model_version": model.version}
        if "id" in document:
            answer["id"] = document["id"]
        return build_answer(answer, _get_outputs(document), rows, model.classes)

    def _check_model(self, request: Request) -> None:
        name, version = request.path_params["model"], request.path_params.get("version")
        if name != self._app.name:
            raise Problem("not-found", f"there is no such model; the model is {self._app.name}")
        if version is not None and version != self._app.batcher.classifier.model.version:
            raise Problem("not-found", "this version of the model is not served")


def _answer(document: dict[str, Any], status: int = 200) -> Response:
    return Response(orjson.dumps(document), status, media_type="application/json")


def _bad(detail: str) -> Problem:
    return Problem("bad-request", detail)


def parse_infer(body: bytes, header_length: str | None, max_images: int) -> tuple[dict[str, Any], NDArray[np.uint8]]:
    """Parse an inference request: its JSON, and the images, uint8 [N, 32, 32, 3].

    Args:
        header_length: bytes of the JSON, where binary tensors follow it; None where none do.

    Raises:
        Problem: it is not what the protocol says, or asks for another input than the model's.
    """
    if header_length is None:
        head, tail = body, b""
    elif header_length.isascii() and header_length.isdecimal() and int(header_length[:12]) <= len(body):
        head, tail = body[: int(header_length)], body[int(header_length) :]
    else:
        raise _bad("Inference-Header-Content-Length takes the number of bytes of the JSON")
    try:
        document = orjson.loads(head)
    except orjson.JSONDecodeError as error:
        raise _bad(f"the body is no JSON: {str(error)[:100]}") from error
    if not isinstance(document, dict):
        raise _bad("the body takes an object")
    if "id" in document and not isinstance(document["id"], str):
        raise _bad("id takes a text")
    _get_outputs(document)
    inputs = document.get("inputs")
    if not isinstance(inputs, list) or len(inputs) != 1 or not isinstance(inputs[0], dict):
        raise _bad(f"inputs takes a list with the one tensor {INPUT}")
    tensor = inputs[0]
    if tensor.get("name") != INPUT or tensor.get("datatype") != "UINT8":
        raise _bad(f"the input is named {INPUT} and of datatype UINT8")
    shape = tensor.get("shape")
    if not isinstance(shape, list) or len(shape) != 4 or not all(type(size) is int and size > 0 for size in shape):
        raise _bad(f"{INPUT} takes the shape [N, {SIDE}, {SIDE}, 3]")
    if shape[1:] != [SIDE, SIDE, 3]:
        raise _bad(f"{INPUT} takes the shape [N, {SIDE}, {SIDE}, 3]")
    if shape[0] > max_images:
        raise Problem("too-many-images", f"a request may hold {max_images} images")
    return document, _read_tensor(tensor, tail).reshape(shape)


def _read_tensor(tensor: dict[str, Any], tail: bytes) -> NDArray[np.uint8]:
    length = math.prod(tensor["shape"])
    parameters = tensor.get("parameters", {})
    if not isinstance(parameters, dict) or "shared_memory_region" in parameters:
        raise _bad("parameters takes an object; shared memory is not offered")
    if "binary_data_size" in parameters:
        if parameters["binary_data_size"] != length or len(tail) != length or "data" in tensor:
            raise _bad(f"{INPUT} of this shape takes {length:,} bytes behind the JSON, and binary_data_size says so")
        return np.frombuffer(tail, np.uint8)
    if tail:
        raise _bad("bytes follow the JSON which no binary_data_size speaks of")
    try:
        data = np.asarray(tensor.get("data"))
    except (ValueError, OverflowError, RecursionError) as error:
        raise _bad("data takes numbers, flat or nested as the shape says") from error
    if data.dtype.kind not in "iu" or data.size != length or data.shape not in ((length,), tuple(tensor["shape"])):
        raise _bad(f"data takes {length:,} whole numbers, flat or nested as the shape says")
    if data.min() < 0 or data.max() > 255:
        raise _bad("data takes whole numbers from 0 to 255")
    return data.astype(np.uint8)


def _get_outputs(document: dict[str, Any]) -> list[tuple[bool, int]]:
    """Get for each output that is asked for whether it shall be binary, and the number of labels, 0 for numbers."""
    parameters = document.get("parameters", {})
    outputs = document.get("outputs", [{"name": OUTPUT}])
    if not isinstance(parameters, dict) or not isinstance(outputs, list) or not outputs:
        raise _bad("parameters takes an object, and outputs a list")
    is_binary = parameters.get("binary_data_output", False)
    asked = []
    for output in outputs:
        if not isinstance(output, dict) or output.get("name") != OUTPUT:
            raise _bad(f"the output is named {OUTPUT}")
        own = output.get("parameters", {})
        if not isinstance(own, dict) or "shared_memory_region" in own:
            raise _bad("parameters takes an object; shared memory is not offered")
        binary, labels = own.get("binary_data", is_binary), own.get("classification", 0)
        if not isinstance(binary, bool) or type(labels) is not int or not 0 <= labels <= MAX_LABELS:
            raise _bad("binary_data takes true or false, classification a whole number")
        asked.append((binary, labels))
    if len(asked) > 1:
        raise _bad(f"outputs takes {OUTPUT} once")
    return asked


def build_answer(
    answer: dict[str, Any], outputs: Sequence[tuple[bool, int]], rows: NDArray[np.float32], classes: Sequence[str]
) -> Response:
    """Build the answer with the probabilities float32 [N, C], as JSON or with what is binary behind it."""
    tails: list[bytes] = []
    answer["outputs"] = []
    for is_binary, num_labels in outputs:
        if num_labels:
            order = np.argsort(-rows, axis=1, kind="stable")[:, :num_labels]
            data: list[Any] = [
                f"{rows[row, index]:f}:{index}:{classes[index]}" for row in range(len(rows)) for index in order[row]
            ]
            tensor: dict[str, Any] = {"name": OUTPUT, "datatype": "BYTES", "shape": list(order.shape)}
            parts = [text.encode() for text in data]
            content = b"".join(itertools.chain(*((len(part).to_bytes(4, "little"), part) for part in parts)))
        else:
            tensor = {"name": OUTPUT, "datatype": "FP32", "shape": list(rows.shape)}
            data, content = rows.ravel().tolist(), rows.tobytes()
        if is_binary:
            tensor["parameters"] = {"binary_data_size": len(content)}
            tails.append(content)
        else:
            tensor["data"] = data
        answer["outputs"].append(tensor)
    head = orjson.dumps(answer)
    if not tails:
        return Response(head, media_type="application/json")
    headers = {"Inference-Header-Content-Length": str(len(head))}
    return Response(b"".join([head, *tails]), headers=headers, media_type="application/octet-stream")
