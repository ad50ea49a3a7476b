"""Declares a route once: its answers, statuses and types, and whether it needs authentication.

The application and `/openapi.json` both use this declaration.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import orjson
from fastapi import FastAPI, Response
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from pydantic import TypeAdapter

from image_classifier.serving.problems import CONTENT_TYPE, KINDS, RETRY_AFTER_S
from image_classifier.serving.schemas import InferenceError, InferenceRequest, ProblemDetails

JSON_TYPE = "application/json"
REFERENCE = "#/components/schemas/{model}"
COMMON = ("bad-request", "request-timeout", "unknown-host", "head-too-large", "internal", "too-many-connections")
"""Problems that every route can answer with."""

RATE = {"Retry-After": {"description": "Seconds to wait", "schema": {"type": "integer", "minimum": 1}}}
SECURITY = {
    "key": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
    "bearer": {"type": "http", "scheme": "bearer"},
}


def add_route(
    api: FastAPI,
    path: str,
    endpoint: Callable[..., Any],
    summary: str,
    answer: Any,
    *kinds: str,
    method: str = "GET",
    is_open: bool = False,
    others: Mapping[int, Mapping[str, Any]] | None = None,
    extra: Mapping[str, Any] | None = None,
) -> None:
    """Add a route.

    Args:
        answer: type of the JSON answer, or the media type of any other answer.
        kinds: problems that it can answer with, in addition to `COMMON`.
        is_open: it needs no authentication.
        others: further answers: schemas by media type, by status.
        extra: further fields of the OpenAPI operation.
    """
    is_v2 = path.startswith("/v2")
    responses = describe_refusals((*COMMON, *kinds, *(() if is_open else ("unauthorized", "rate-limited"))), is_v2)
    for status, content in (others or {}).items():
        responses.setdefault(status, {}).setdefault("content", {}).update(content)
    if isinstance(answer, str):
        responses[200] = {"description": summary, "content": {answer: {"schema": {"type": "string"}}}}
        answer = None
    api.add_api_route(
        path,
        endpoint,
        methods=[method],
        summary=summary,
        operation_id=("v2_" if is_v2 else "") + endpoint.__name__ + ("_version" if "{version}" in path else ""),
        response_model=answer,
        response_class=Response if answer is None else JSONResponse,  # for OpenAPI alone: `answer_json` builds answers
        responses=responses,
        openapi_extra={**({"security": []} if is_open else {}), **(extra or {})},
    )


def describe_refusals(kinds: Iterable[str], is_v2: bool) -> dict[int | str, dict[str, Any]]:
    """Build the OpenAPI responses of a route's problems, by status."""
    titles: dict[int, list[str]] = defaultdict(list)
    responses: dict[int | str, dict[str, Any]] = {}
    media_type, schema = (JSON_TYPE, InferenceError) if is_v2 else (CONTENT_TYPE.decode(), ProblemDetails)
    for kind in kinds:
        status = int(KINDS[kind][0])
        titles[status].append(KINDS[kind][1])
        content = {media_type: {"schema": refer_to(schema)}}
        responses[status] = {"description": "; ".join(titles[status]), "content": content}
        if kind in RETRY_AFTER_S:
            responses[status]["headers"] = RATE
    return responses


def refer_to(kind: type) -> dict[str, str]:
    """Build a reference to the schema of a type that `complete_openapi` adds."""
    return {"$ref": REFERENCE.format(model=kind.__name__)}


def is_open_route(route: APIRoute) -> bool:
    """Return whether a route needs no authentication."""
    return "security" in (route.openapi_extra or {})


def answer_json(document: Any, status: int = 200) -> Response:
    """Build a JSON answer."""
    return Response(orjson.dumps(document), status, media_type=JSON_TYPE)


def complete_openapi(document: dict[str, Any]) -> dict[str, Any]:
    """Add authentication and schemas to FastAPI's OpenAPI document; remove FastAPI's own 422, which is never sent."""
    document["security"] = [{name: []} for name in SECURITY] + [{}]
    components = document["components"]
    components["securitySchemes"] = SECURITY
    for kind in (ProblemDetails, InferenceError, InferenceRequest):
        schema = TypeAdapter(kind).json_schema(ref_template=REFERENCE)
        components["schemas"] |= schema.pop("$defs", {}) | {kind.__name__: schema}
    types = [f"urn:image-classifier:problem:{kind}" for kind in KINDS]
    components["schemas"]["ProblemDetails"]["properties"]["type"] = {"enum": types}
    for name in ("HTTPValidationError", "ValidationError"):
        components["schemas"].pop(name, None)
    for operations in document["paths"].values():
        for operation in operations.values():
            invalid = operation["responses"].get("422", {}).get("content", {}).get(JSON_TYPE, {}).get("schema", {})
            if invalid.get("$ref", "").endswith("/HTTPValidationError"):
                del operation["responses"]["422"]
    return document
