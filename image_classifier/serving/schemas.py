"""What the routes take and give, as types: pydantic checks what comes, mypy what goes, and OpenAPI shows both."""

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
    """Read a whole number that came as text, of digits alone."""
    return int(value) if isinstance(value, str) and value.isascii() and value.isdecimal() and len(value) < 10 else value


def _read_flag(value: object) -> object:
    return {"true": True, "false": False}.get(value, value) if isinstance(value, str) else value


def _read_base64(value: object) -> bytes:
    if not isinstance(value, str):
        raise ValueError("takes a text")
    try:
        return binascii.a2b_base64(value.encode("ascii"), strict_mode=True)
    except ValueError:
        raise ValueError("is no base64") from None


Whole = Annotated[int, BeforeValidator(_read_whole)]
Base64 = Annotated[
    bytes, BeforeValidator(_read_base64), WithJsonSchema({"type": "string", "contentEncoding": "base64"})
]


class PredictOptions(BaseModel):
    """What may be asked for with an image."""

    model_config = ConfigDict(extra="forbid", strict=True)

    top_k: Whole = Field(default=DEFAULT_TOP_K, ge=1, le=99_999, description="Classes to name")
    request_id: str = Field(
        default_factory=str,
        min_length=1,
        max_length=MAX_REQUEST_ID,
        pattern="^[ -~]+$",
        description="Comes back in the answer",
    )
    show_input: Annotated[bool, BeforeValidator(_read_flag)] = Field(
        default=False, description="Answer with the pixels that the network saw"
    )


class PredictDocument(PredictOptions):
    """Image files in base64, and options."""

    images: Annotated[list[Base64], Field(fail_fast=True)] = Field(
        description="Image files in base64", json_schema_extra={"minItems": 1}
    )


Score = TypedDict("Score", {"class": str, "probability": Annotated[float, Field(ge=0, le=1.000001)]})


class Prediction(Score):
    """The most probable class of an image."""

    top_k: Annotated[list[Score], Field(min_length=1)]
    input: NotRequired[Annotated[str, Field(json_schema_extra={"contentEncoding": "base64"})]]


class Predictions(TypedDict):
    """A prediction for each image, in their order."""

    predictions: Annotated[list[Prediction], Field(min_length=1)]
    request_id: str
    model_version: str
    api_version: Literal["1"]


class Tensor(TypedDict):
    """What a model takes or gives; None where any number of images is."""

    datatype: str
    shape: list[int | None]
    channels: NotRequired[str]


class Verdict(TypedDict):
    """What somebody says about the run of a model; the signer is None where no policy has checked who that is."""

    verdict: Literal["IDENTICAL", "DIFFERENT"]
    signer: str | None
    checked: str
    processor_family: str
    verified_at: str


class ModelDescription(TypedDict):
    """A model: what it takes and gives, what it comes from, its card, and verdicts about its run."""

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
    """How the server is."""

    status: str


class ProblemDetails(TypedDict):
    """What is wrong, as RFC 9457 has it."""

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
        raise ValueError("shared memory is not offered")
    return value


class _Protocol(BaseModel):
    model_config = ConfigDict(strict=True)


class InputParameters(_Protocol):
    """How a tensor comes."""

    binary_data_size: int | None = Field(default=None, ge=0, description="Bytes of this tensor, which follow the JSON")


class InputTensor(_Protocol):
    """The images."""

    name: Literal["images"]
    datatype: Literal["UINT8"]
    shape: Annotated[list[Annotated[int, Field(ge=1)]], Field(min_length=4, max_length=4)]
    parameters: Annotated[InputParameters, BeforeValidator(_refuse_shared_memory)] = InputParameters()
    data: Bytes | Images | None = Field(default=None, description="Flat, or nested as the shape says")


class OutputParameters(_Protocol):
    """How a tensor is wanted."""

    binary_data: bool | None = None
    classification: int = Field(default=0, ge=0, le=MAX_LABELS, description="Labels an image, instead of numbers")


class OutputWanted(_Protocol):
    """The probabilities."""

    name: Literal["probabilities"]
    parameters: Annotated[OutputParameters, BeforeValidator(_refuse_shared_memory)] = OutputParameters()


class RequestParameters(_Protocol):
    """How all tensors are wanted."""

    binary_data_output: bool = False


class InferenceRequest(_Protocol):
    """Images to compute the probabilities of."""

    id: str = Field(default_factory=str)
    parameters: RequestParameters = RequestParameters()
    inputs: Annotated[list[InputTensor], Field(min_length=1, max_length=1)]
    outputs: Annotated[list[OutputWanted], Field(min_length=1, max_length=1)] = [OutputWanted(name="probabilities")]


assert (INPUT, OUTPUT) == ("images", "probabilities")  # the names above, which types can only spell out


class OutputTensor(TypedDict):
    """Probabilities or labels."""

    name: str
    datatype: str
    shape: list[int]
    parameters: NotRequired[dict[str, int]]
    data: NotRequired[list[float] | list[str]]


class InferenceAnswer(TypedDict):
    """The probabilities."""

    model_name: str
    model_version: str
    id: NotRequired[str]
    outputs: list[OutputTensor]


class InferenceError(TypedDict):
    """What is wrong."""

    error: str


class ServerMetadata(TypedDict):
    """The server."""

    name: str
    version: str
    extensions: list[str]


class TensorMetadata(TypedDict):
    """A tensor; -1 where any number of images is."""

    name: str
    datatype: str
    shape: list[int]


class ModelMetadata(TypedDict):
    """The model's tensors."""

    name: str
    versions: list[str]
    platform: str
    inputs: list[TensorMetadata]
    outputs: list[TensorMetadata]


class Live(TypedDict):
    """Whether the server answers."""

    live: bool


class Ready(TypedDict):
    """Whether requests should be sent."""

    name: NotRequired[str]
    ready: bool


def explain_invalid(error: ValidationError | Any) -> str:
    """What is wrong with what came, in one line; nothing of it is repeated but the names of fields."""
    first = error.errors()[0]
    place = ".".join(str(part)[:40] for part in first["loc"] if part not in ("query", "header", "path"))
    text = f"{place}: {first['msg']}" if place else str(first["msg"])
    return text.replace("Value error, ", "")[:200]
