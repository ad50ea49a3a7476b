"""The Open Inference Protocol (V2) with the binary tensor extension, for clients of KServe and Triton."""

from __future__ import annotations

import math
from typing import Annotated, Any

import numpy as np
import orjson
from fastapi import FastAPI, Header, Request, Response
from numpy.typing import NDArray
from pydantic import ValidationError

from image_classifier import __version__
from image_classifier.image_sizes import DEFAULT_IMAGE_SIZE
from image_classifier.published.predictor import INPUT, OUTPUT
from image_classifier.serving import schemas
from image_classifier.serving.batching import Ticket
from image_classifier.serving.candidates import PinnedTicket
from image_classifier.serving.problems import Problem
from image_classifier.serving.requests import MAX_JSON_PARTS, check_encoding, check_parts
from image_classifier.serving.routes import JSON_TYPE, add_route, answer_json, refer_to
from image_classifier.serving.service import Service

HEADER_LENGTH = "Inference-Header-Content-Length"
BINARY = "application/octet-stream"
BINARY_SCHEMA = {BINARY: {"schema": {"type": "string", "format": "binary"}}}
HeaderLength = Annotated[
    schemas.Whole | None,
    Header(alias=HEADER_LENGTH, ge=0, description="Size in bytes of the JSON before a binary tensor"),
]


class InferenceProtocol:
    """The routes below `/v2`."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def add_routes(self, api: FastAPI) -> None:
        """Add the routes."""
        not_ready = {503: {JSON_TYPE: {"schema": {"type": "object"}}}}
        add_route(api, "/v2/health/live", self.live, "Liveness probe", schemas.Live, is_open=True)
        ready = "Readiness probe"
        add_route(api, "/v2/health/ready", self.ready, ready, schemas.Ready, is_open=True, others=not_ready)
        add_route(api, "/v2", self.server, "Server metadata", schemas.ServerMetadata)
        content = {JSON_TYPE: {"schema": refer_to(schemas.InferenceRequest)}, **BINARY_SCHEMA}
        for path in ("/v2/models/{model}", "/v2/models/{model}/versions/{version}"):
            add_route(api, path, self.model, "Model metadata", schemas.ModelMetadata, "not-found")
            ready = "Readiness of the model"
            add_route(api, f"{path}/ready", self.model_ready, ready, schemas.Ready, "not-found", others=not_ready)
            add_route(
                api,
                f"{path}/infer",
                self.infer,
                "Classify images",
                schemas.InferenceAnswer,
                *("not-found", "body-too-large", "too-many-images", "unsupported-media-type", "queue-full"),
                *("deadline", "not-ready", "out-of-memory"),
                method="POST",
                others={200: BINARY_SCHEMA},
                extra={"requestBody": {"required": True, "content": content}},
            )

    async def server(self) -> Response:
        """Describe the server."""
        extensions = ["binary_tensor_data"]
        return answer_json(schemas.ServerMetadata(name="image_classifier", version=__version__, extensions=extensions))

    async def live(self) -> Response:
        """Answer the liveness probe."""
        return answer_json(schemas.Live(live=True))

    async def ready(self) -> Response:
        """Answer the readiness probe."""
        is_ready = self._service.is_ready
        return answer_json(schemas.Ready(ready=is_ready), 200 if is_ready else 503)

    async def model_ready(self, model: str, version: str | None = None) -> Response:
        """Answer the readiness probe of the model."""
        self._check_model(model, version)
        is_ready = self._service.is_ready
        return answer_json(schemas.Ready(name=self._service.name, ready=is_ready), 200 if is_ready else 503)

    async def model(self, model: str, version: str | None = None) -> Response:
        """Describe the inputs and outputs of the model."""
        self._check_model(model, version)
        served = self._service.batcher.classifier.model
        facts: schemas.ModelMetadata = {
            "name": self._service.name,
            "versions": [served.version],
            "platform": "onnxruntime_onnx",
            "inputs": [{"name": INPUT, "datatype": "UINT8", "shape": [-1, served.image_size, served.image_size, 3]}],
            "outputs": [{"name": OUTPUT, "datatype": "FP32", "shape": [-1, len(served.classes)]}],
        }
        return answer_json(facts)

    async def infer(
        self, request: Request, model: str, version: str | None = None, header_length: HeaderLength = None
    ) -> Response:
        """Classify images."""
        service = self._service
        self._check_model(model, version)
        check_encoding(request.headers)
        async with service.hold_body(request) as chunks:
            side, num_bytes = service.batcher.image_size, service.batcher.num_bytes
            asked, pixels = await service.parse(chunks, parse_infer, header_length, service.settings.max_images, side)
            kind = Ticket if version is None else PinnedTicket  # the champion has the requested version
            tickets = [kind(pixels[start : start + num_bytes]) for start in range(0, len(pixels), num_bytes)]
            tickets = await service.compute(tickets, request)
        served = tickets[0].classifier.model
        if service.recorder is not None:
            request_id = asked.id[: schemas.MAX_REQUEST_ID] or service.find_id(dict(request.scope["headers"]))
            service.recorder.record(served, tickets, request_id, request.scope["caller"].name)
        rows = np.array([ticket.row for ticket in tickets], np.float32)
        answer: schemas.InferenceAnswer = {
            "model_name": service.name,
            "model_version": served.version,
            **({"id": asked.id} if "id" in asked.model_fields_set else {}),  # type: ignore[typeddict-item]
            "outputs": [],
        }
        wanted = asked.outputs[0].parameters
        is_binary = asked.parameters.binary_data_output if wanted.binary_data is None else wanted.binary_data
        tensor, content = build_tensor(rows, served.classes, wanted.classification)
        answer["outputs"].append(tensor)
        if not is_binary:
            return answer_json(answer)
        del tensor["data"]
        tensor["parameters"] = {"binary_data_size": len(content)}
        head = orjson.dumps(answer)
        return Response(head + content, headers={HEADER_LENGTH: str(len(head))}, media_type=BINARY)

    def _check_model(self, name: str, version: str | None) -> None:
        if name != self._service.name:
            raise Problem("not-found", f"no such model; the server has the model {self._service.name}")
        if version is not None and version != self._service.batcher.classifier.model.version:
            raise Problem("not-found", "the server does not have this version of the model")


def count_parts(max_images: int, side: int) -> int:
    """Compute the limit of commas and brackets in nested JSON pixels.

    It is that of one image, or of `max_images` of the default size if that is more. Parsing larger JSON would delay all
    requests for seconds; a binary tensor does not.

    Args:
        side: of the model's images in pixels.
    """
    one, default = (each * each * 4 + each + 2 for each in (side, DEFAULT_IMAGE_SIZE))
    return max(one, max_images * default)


def parse_infer(
    body: bytes, header_length: int | None, max_images: int, side: int
) -> tuple[schemas.InferenceRequest, bytes]:
    """Parse an inference request into its JSON and the pixels of its images, uint8 [N, S, S, 3] in C order.

    Args:
        header_length: size in bytes of the JSON before a binary tensor; None if there is no binary tensor.
        side: of the model's images in pixels.

    Raises:
        Problem: the request violates the protocol, or its tensors do not match the model's.
    """
    if header_length is not None and header_length > len(body):
        raise Problem("bad-request", f"{HEADER_LENGTH} takes the size of the JSON in bytes")
    head, tail = (body, b"") if header_length is None else (body[:header_length], body[header_length:])
    check_parts(head, count_parts(max_images, side) + MAX_JSON_PARTS)
    try:
        asked = schemas.InferenceRequest.model_validate_json(head)
    except ValidationError as error:
        raise Problem("bad-request", schemas.explain_invalid(error)) from None
    (tensor,) = asked.inputs
    if tensor.shape[1:] != [side, side, 3]:
        raise Problem("bad-request", f"{INPUT} takes the shape [N, {side}, {side}, 3]")
    if tensor.shape[0] > max_images:
        raise Problem("too-many-images", f"a request may have {max_images} images")
    length = math.prod(tensor.shape)
    size = tensor.parameters.binary_data_size
    if size is not None:
        if size != length or len(tail) != length or tensor.data is not None:
            detail = f"{INPUT} of this shape takes {length:,} bytes after the JSON, and the same binary_data_size"
            raise Problem("bad-request", detail)
        return asked, tail
    if tail:
        raise Problem("bad-request", "bytes follow the JSON, but binary_data_size is missing")
    try:
        data: NDArray[np.uint8] = np.array(tensor.data or [], np.uint8)
        is_whole = data.shape in ((length,), tuple(tensor.shape))
    except ValueError:  # rows of different lengths
        is_whole = False
    if not is_whole:
        raise Problem("bad-request", f"data takes {length:,} whole numbers, flat or nested according to the shape")
    return asked, data.tobytes()


def build_tensor(rows: NDArray[np.float32], classes: tuple[str, ...], num_labels: int) -> tuple[Any, bytes]:
    """Build the output tensor of an answer from probabilities, float32 [N, C]; also return it as bytes.

    Args:
        num_labels: number of labels per image to return instead of probabilities; 0 for probabilities.
    """
    if not num_labels:
        tensor: schemas.OutputTensor = {"name": OUTPUT, "datatype": "FP32", "shape": list(rows.shape), "data": []}
        tensor["data"] = rows.ravel().tolist()
        return tensor, rows.tobytes()
    order = np.argsort(-rows, axis=1, kind="stable")[:, :num_labels]
    data = [f"{rows[row, index]:f}:{index}:{classes[index]}" for row in range(len(rows)) for index in order[row]]
    content = b"".join(len(part).to_bytes(4, "little") + part for part in map(str.encode, data))
    return {"name": OUTPUT, "datatype": "BYTES", "shape": list(order.shape), "data": data}, content
