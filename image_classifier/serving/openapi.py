"""The server's description in OpenAPI 3.1; `docs/openapi.json` is what this builds."""

from __future__ import annotations

import json
from typing import Any

from image_classifier import __version__
from image_classifier.serving.problems import KINDS
from image_classifier.serving.requests import DEFAULT_TOP_K, IMAGE_TYPES, MAX_REQUEST_ID, PIXELS

API_VERSION = "1"

_REFUSALS = {
    "400": "The request is not as it should be",
    "401": "A valid key or token is needed",
    "404": "There is nothing at this path",
    "405": "The path does not take this method",
    "408": "The request did not arrive in time",
    "413": "The body is too large, or holds too many images",
    "415": "The body is of a type that is not taken",
    "422": "The image cannot be read",
    "429": "As many images wait as may wait",
    "503": "The server is not ready, or the answer would have come too late",
}


def build_openapi() -> dict[str, Any]:
    """Build the description."""
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "image_classifier",
            "version": __version__,
            "description": "Classifies images with a published model.",
            "license": {"name": "MIT", "identifier": "MIT"},
        },
        "security": [{"key": []}, {"bearer": []}, {}],
        "paths": _build_paths(),
        "components": {
            "securitySchemes": {
                "key": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
                "bearer": {"type": "http", "scheme": "bearer"},
            },
            "schemas": _build_schemas(),
            "responses": {
                **{status: _build_refusal(status, text, "Problem") for status, text in _REFUSALS.items()},
                **{
                    f"v2-{status}": _build_refusal(status, text, "InferenceError") for status, text in _REFUSALS.items()
                },
            },
        },
    }


def _build_refusal(status: str, text: str, schema: str) -> dict[str, Any]:
    kind = "application/json" if schema == "InferenceError" else "application/problem+json"
    answer: dict[str, Any] = {"description": text, "content": {kind: {"schema": _refer(schema)}}}
    if status in ("429", "503"):
        answer["headers"] = {
            "Retry-After": {"description": "Seconds to wait", "schema": {"type": "integer", "minimum": 1}}
        }
    return answer


def _refer(schema: str) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{schema}"}


def _answer(description: str, schema: dict[str, Any], kind: str = "application/json") -> dict[str, Any]:
    return {"200": {"description": description, "content": {kind: {"schema": schema}}}}


def _refuse(*statuses: int, prefix: str = "") -> dict[str, Any]:
    return {str(status): {"$ref": f"#/components/responses/{prefix}{status}"} for status in statuses}


def _build_paths() -> dict[str, Any]:
    thing: dict[str, Any] = {"type": "object"}
    text: dict[str, Any] = {"type": "string"}
    image = {"type": "string", "format": "binary", "description": "An image file; it becomes 32 by 32 pixels"}
    top_k = {"type": "integer", "minimum": 1, "maximum": 99999}
    name = {"type": "string", "minLength": 1, "maxLength": MAX_REQUEST_ID, "pattern": "^[ -~]+$"}
    images = {"type": "array", "items": {"type": "string", "contentEncoding": "base64"}, "minItems": 1}
    document = {
        "type": "object",
        "description": "Image files in base64",
        "required": ["images"],
        "properties": {"images": images, "top_k": top_k, "request_id": name, "show_input": {"type": "boolean"}},
        "additionalProperties": False,
    }
    form = {
        "type": "object",
        "description": "Image files, one a part",
        "required": ["image"],
        "properties": {"image": {"type": "array", "items": {**image}, "minItems": 1}, "top_k": top_k},
    }
    pixels = {
        "type": "string",
        "format": "binary",
        "minLength": 3072,
        "description": "3,072 bytes an image: 32 rows of 32 pixels, each red, green, blue",
    }
    predict = {
        "operationId": "predict",
        "summary": "Classify one image or several",
        "parameters": [
            {
                "name": "top_k",
                "in": "query",
                "description": f"Classes to name; {DEFAULT_TOP_K} without",
                "schema": top_k,
            },
            {"name": "request_id", "in": "query", "description": "Comes back in the answer", "schema": name},
            {
                "name": "show_input",
                "in": "query",
                "description": "Answer with the pixels that the network saw",
                "schema": {"enum": ["true", "false"]},
            },
            {"name": "X-Request-ID", "in": "header", "description": "Comes back in the answer", "schema": text},
        ],
        "requestBody": {
            "required": True,
            "content": {
                PIXELS.decode(): {"schema": pixels},
                **{kind.decode(): {"schema": image} for kind in IMAGE_TYPES},
                "multipart/form-data": {"schema": form},
                "application/json": {"schema": document},
            },
        },
        "responses": {
            **_answer("A prediction for each image", _refer("Predictions")),
            **_refuse(400, 401, 408, 413, 415, 422, 429, 503),
        },
    }

    def get(operation: str, summary: str, answers: dict[str, Any], *refusals: int, prefix: str = "") -> dict[str, Any]:
        responses = {**answers, **_refuse(*refusals, prefix=prefix)}
        return {"operationId": operation, "summary": summary, "responses": responses}

    def get_health(operation: str, summary: str, *refusals: int, prefix: str = "") -> dict[str, Any]:
        return {"get": {**get(operation, summary, _answer("Yes", thing), *refusals, prefix=prefix), "security": []}}

    page = {"type": "string"}
    paths: dict[str, Any] = {
        "/predict": {"post": predict},
        "/model": {"get": get("model", "The model: classes, card and provenance", _answer("The model", thing), 401)},
        "/health/live": get_health("live", "Whether the server answers"),
        "/health/ready": get_health("ready", "Whether it should get requests", 503),
        "/metrics": {
            "get": get("metrics", "Metrics in Prometheus's format", _answer("Metrics", text, "text/plain"), 401)
        },
        "/openapi.json": {"get": {**get("openapi", "This description", _answer("OpenAPI", thing)), "security": []}},
        "/docs": {
            "get": {**get("docs", "This description to read", _answer("A page", page, "text/html")), "security": []}
        },
        "/": {"get": {**get("page", "A page to try the model", _answer("A page", page, "text/html")), "security": []}},
        "/v2": {"get": get("v2_server", "The server", _answer("The server", thing), 401, prefix="v2-")},
        "/v2/health/live": get_health("v2_live", "Whether the server answers", prefix="v2-"),
        "/v2/health/ready": get_health("v2_ready", "Whether it should get requests", 503, prefix="v2-"),
    }
    for version in ("", "/versions/{version}"):
        base = f"/v2/models/{{model}}{version}"
        suffix = "_version" if version else ""
        names = ["model", "version"] if version else ["model"]
        parameters = [{"name": name, "in": "path", "required": True, "schema": text} for name in names]
        ready = get(f"v2_model_ready{suffix}", "Whether the model is ready", _answer("Yes", thing), prefix="v2-")
        ready["responses"] |= _refuse(401, 404, 503, prefix="v2-")
        described = get(f"v2_model{suffix}", "The model's tensors", _answer("The model", thing), prefix="v2-")
        described["responses"] |= _refuse(401, 404, prefix="v2-")
        infer = {
            "operationId": f"v2_infer{suffix}",
            "summary": "Compute the probabilities of images",
            "requestBody": {"required": True, "content": {"application/json": {"schema": _refer("InferenceRequest")}}},
            "responses": {
                **_answer("The probabilities", _refer("InferenceAnswer")),
                **_refuse(400, 401, 404, 408, 413, 415, 429, 503, prefix="v2-"),
            },
        }
        paths[base] = {"parameters": parameters, "get": described}
        paths[f"{base}/ready"] = {"parameters": parameters, "get": ready}
        paths[f"{base}/infer"] = {"parameters": parameters, "post": infer}
    return paths


def _build_schemas() -> dict[str, Any]:
    text: dict[str, Any] = {"type": "string"}
    score = {
        "type": "object",
        "required": ["class", "probability"],
        "properties": {"class": text, "probability": {"type": "number", "minimum": 0, "maximum": 1.000001}},
    }
    kinds = [f"urn:image-classifier:problem:{kind}" for kind in KINDS]
    tensor = {
        "type": "object",
        "required": ["name", "datatype", "shape"],
        "properties": {
            "name": text,
            "datatype": text,
            "shape": {"type": "array", "items": {"type": "integer"}},
            "parameters": {"type": "object"},
            "data": {"type": "array"},
        },
    }
    return {
        "Score": score,
        "Predictions": {
            "type": "object",
            "required": ["predictions", "request_id", "model_version", "api_version"],
            "properties": {
                "predictions": {
                    "type": "array",
                    "minItems": 1,
                    "items": {
                        "type": "object",
                        "required": ["class", "probability", "top_k"],
                        "properties": {
                            **score["properties"],  # type: ignore[dict-item]  # of dict[str, object]
                            "top_k": {"type": "array", "items": _refer("Score"), "minItems": 1},
                            "input": {"type": "string", "contentEncoding": "base64"},
                        },
                    },
                },
                "request_id": text,
                "model_version": text,
                "api_version": {"const": API_VERSION},
            },
        },
        "Problem": {
            "type": "object",
            "description": "RFC 9457",
            "required": ["type", "title", "status", "detail"],
            "properties": {
                "type": {"enum": kinds},
                "title": text,
                "status": {"type": "integer"},
                "detail": text,
                "request_id": text,
            },
        },
        "InferenceError": {"type": "object", "required": ["error"], "properties": {"error": text}},
        "InferenceRequest": {
            "type": "object",
            "required": ["inputs"],
            "properties": {
                "id": text,
                "parameters": {"type": "object"},
                "inputs": {"type": "array", "items": tensor, "minItems": 1, "maxItems": 1},
                "outputs": {"type": "array", "items": {"type": "object"}},
            },
        },
        "InferenceAnswer": {
            "type": "object",
            "required": ["model_name", "model_version", "outputs"],
            "properties": {
                "model_name": text,
                "model_version": text,
                "id": text,
                "outputs": {"type": "array", "items": tensor},
            },
        },
    }


if __name__ == "__main__":
    print(json.dumps(build_openapi(), indent=2))
