"""Types of requests and answers. Pydantic validates requests, mypy checks answers, and OpenAPI documents both."""

from __future__ import annotations

import binascii
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, WithJsonSchema
from typing_extensions import NotRequired, TypedDict

from image_classifier.published.predictor import INPUT, OUTPUT

API_VERSION: Literal["1"] = "1"
DEFAULT_TOP_K = 5
MAX_REQUEST_ID = 128
MAX_LABELS = 1000


def _read_whole(value: object) -> object:
    """Parse an integer of digits only; leave any other value for pydantic to refuse."""
    return int(value) if isinstance(value, str) and value.isascii() and value.isdecimal() and len(value) < 10 else value


def _read_flag(value: object) -> object:
    return {"true": True, "false": False}.get(value, value) if isinstance(value, str) else value


def _read_base64(value: object) -> bytes:
    if not isinstance(value, str):
        raise ValueError("must be a string")
    try:
        return binascii.a2b_base64(value.encode("ascii"), strict_mode=True)
    except ValueError:
        raise ValueError("is not valid base64") from None


Whole = Annotated[int, BeforeValidator(_read_whole)]
Base64 = Annotated[
    bytes, BeforeValidator(_read_base64), WithJsonSchema({"type": "string", "contentEncoding": "base64"})
]


class PredictOptions(BaseModel):
    """Options of a prediction."""

    model_config = ConfigDict(extra="forbid", strict=True)

    top_k: Whole = Field(
        default=DEFAULT_TOP_K, ge=1, le=99_999, description="Number of most probable classes to return"
    )
    request_id: str = Field(
        default_factory=str,
        min_length=1,
        max_length=MAX_REQUEST_ID,
        pattern="^[ -~]+$",
        description="Id that the answer repeats",
    )
    show_input: Annotated[bool, BeforeValidator(_read_flag)] = Field(
        default=False, description="Return the pixels of the network's input"
    )


class PredictDocument(PredictOptions):
    """Base64-encoded image files, and options."""

    images: Annotated[list[Base64], Field(fail_fast=True)] = Field(
        description="Base64-encoded image files", json_schema_extra={"minItems": 1}
    )


Score = TypedDict("Score", {"class": str, "probability": Annotated[float, Field(ge=0, le=1.000001)]})


class Prediction(Score):
    """The most probable class of an image."""

    top_k: Annotated[list[Score], Field(min_length=1)]
    input: NotRequired[Annotated[str, Field(json_schema_extra={"contentEncoding": "base64"})]]


class Predictions(TypedDict):
    """One prediction per image, in the order of the request."""

    predictions: Annotated[list[Prediction], Field(min_length=1)]
    request_id: str
    model_version: str
    api_version: Literal["1"]


class Tensor(TypedDict):
    """Type and shape of a model's input or output; null stands for the batch size."""

    datatype: str
    shape: list[int | None]
    channels: NotRequired[str]


class Verdict(TypedDict):
    """A verdict about a model's run. The signer is null unless a policy checked the signature."""

    verdict: Literal["IDENTICAL", "DIFFERENT"]
    signer: str | None
    checked: str
    processor_family: str
    verified_at: str


class ModelDescription(TypedDict):
    """A model: input, output, run, model card, and verdicts about its run."""

    name: str
    version: str
    classes: list[str]
    experiment_name: str
    run_name: str
    data_digest: str
    views: str
    format_version: int
    fit: str
    image_size: int
    input: Tensor
    output: Tensor
    manifest: dict[str, Any] | None
    card: str | None
    verdicts: list[Verdict]


class Status(TypedDict):
    """State of the server."""

    status: str


class ProblemDetails(TypedDict):
    """An error, as defined by RFC 9457."""

    type: str
    title: str
    status: int
    detail: str
    request_id: NotRequired[str]


# The Open Inference Protocol

Byte = Annotated[int, Field(ge=0, le=255)]
Bytes = Annotated[list[Byte], Field(fail_fast=True)]
Pixel = Annotated[list[Byte], Field(fail_fast=True, min_length=3, max_length=3)]
Row = Annotated[list[Pixel], Field(fail_fast=True)]
Image = Annotated[list[Row], Field(fail_fast=True)]
Images = Annotated[list[Image], Field(fail_fast=True)]


def _refuse_shared_memory(value: object) -> object:
    if isinstance(value, dict) and "shared_memory_region" in value:
        raise ValueError("shared memory is not supported")
    return value


class _Protocol(BaseModel):
    model_config = ConfigDict(strict=True)


class InputParameters(_Protocol):
    """Encoding of an input tensor."""

    binary_data_size: int | None = Field(default=None, ge=0, description="Size in bytes of the tensor after the JSON")


class InputTensor(_Protocol):
    """The images, uint8 [N, S, S, 3]."""

    name: Literal["images"]
    datatype: Literal["UINT8"]
    shape: Annotated[list[Annotated[int, Field(ge=1)]], Field(min_length=4, max_length=4)]
    parameters: Annotated[InputParameters, BeforeValidator(_refuse_shared_memory)] = InputParameters()
    data: Bytes | Images | None = Field(default=None, description="Flat, or nested according to the shape")


class OutputParameters(_Protocol):
    """Encoding of an output tensor."""

    binary_data: bool | None = None
    classification: int = Field(
        default=0, ge=0, le=MAX_LABELS, description="Number of labels per image to return instead of probabilities"
    )


class OutputWanted(_Protocol):
    """The probabilities, float32 [N, C]."""

    name: Literal["probabilities"]
    parameters: Annotated[OutputParameters, BeforeValidator(_refuse_shared_memory)] = OutputParameters()


class RequestParameters(_Protocol):
    """Encoding of all output tensors."""

    binary_data_output: bool = False


class InferenceRequest(_Protocol):
    """A request to classify images."""

    id: str = Field(default_factory=str)
    parameters: RequestParameters = RequestParameters()
    inputs: Annotated[list[InputTensor], Field(min_length=1, max_length=1)]
    outputs: Annotated[list[OutputWanted], Field(min_length=1, max_length=1)] = [OutputWanted(name="probabilities")]


assert (INPUT, OUTPUT) == ("images", "probabilities")  # the types above need literals


class OutputTensor(TypedDict):
    """Probabilities or labels."""

    name: str
    datatype: str
    shape: list[int]
    parameters: NotRequired[dict[str, int]]
    data: NotRequired[list[float] | list[str]]


class InferenceAnswer(TypedDict):
    """The answer of an inference request."""

    model_name: str
    model_version: str
    id: NotRequired[str]
    outputs: list[OutputTensor]


class InferenceError(TypedDict):
    """An error of the Open Inference Protocol."""

    error: str


class ServerMetadata(TypedDict):
    """Name, version and protocol extensions of the server."""

    name: str
    version: str
    extensions: list[str]


class TensorMetadata(TypedDict):
    """Type and shape of a tensor; -1 stands for the batch size."""

    name: str
    datatype: str
    shape: list[int]


class ModelMetadata(TypedDict):
    """Inputs and outputs of the model."""

    name: str
    versions: list[str]
    platform: str
    inputs: list[TensorMetadata]
    outputs: list[TensorMetadata]


class Live(TypedDict):
    """Liveness."""

    live: bool


class Ready(TypedDict):
    """Readiness."""

    name: NotRequired[str]
    ready: bool


def explain_invalid(error: ValidationError | Any) -> str:
    """Describe the first validation error on one line, without values from the request."""
    first = error.errors()[0]
    place = ".".join(str(part)[:40] for part in first["loc"] if part not in ("query", "header", "path"))
    text = f"{place}: {first['msg']}" if place else str(first["msg"])
    return text.replace("Value error, ", "")[:200]
