"""What the application says of the model, and that its description is the one in the documents."""

from __future__ import annotations

import asyncio
import json
import re
import threading
from typing import Any

import orjson
import pytest
from fastapi.routing import APIRoute
from pydantic import TypeAdapter

from image_classifier.published.predictor import PublishedModel
from image_classifier.published.verdicts import Verdict
from image_classifier.serving import schemas
from image_classifier.serving.app import App, describe_model
from image_classifier.serving.problems import KINDS, RETRY_AFTER_S, Problem
from image_classifier.serving.routes import is_open_route
from image_classifier.serving.site import build_documents
from tests.batching import build_app
from tests.conftest import PROJECT

OPEN = {"/", "/docs", "/openapi.json", "/health/live", "/health/ready", "/v2/health/live", "/v2/health/ready"}


@pytest.fixture(name="app", scope="module")
def build() -> App:
    return build_app()


def describe_card(card: bytes | None) -> object:
    """Describe a model with a card, and return what is shown of that."""
    verdict = Verdict("IDENTICAL", None, "all 300 steps", "x86_64", "2026-06-01T12:00:00Z")
    shown: Any = {"card": card, "manifest": b'{"a": 1}', "samples": b"a picture", "verdicts": (verdict,)}
    model = PublishedModel(PROJECT, ("a", "b"), "1", "e", "r", "0" * 64, "one", 1, **shown)
    described = describe_model("model", model)
    TypeAdapter(schemas.ModelDescription).validate_json(orjson.dumps(described))
    assert described["manifest"] == {"a": 1} and "samples" not in described
    assert described["verdicts"][0]["signer"] is None and described["name"] == "model"
    return described["card"]


def test_the_card_that_was_read_with_the_model_is_shown() -> None:
    assert describe_card(None) is None
    assert describe_card(b"# A model\xff") == "# A model\ufffd"


def test_the_committed_description_is_the_servers(app: App) -> None:
    committed = json.loads((PROJECT / "docs" / "openapi.json").read_text(encoding="utf-8"))
    assert committed == json.loads(json.dumps(app.describe())), "python -m tests.openapi"
    assert app.describe() is app.describe(), "it is built again for each who asks, which holds up all others"


def test_the_event_loop_goes_on_while_metrics_are_rendered(app: App, monkeypatch: pytest.MonkeyPatch) -> None:
    has_gone_on = threading.Event()
    monkeypatch.setattr(app.metrics, "render", lambda: b"%d" % has_gone_on.wait(30))

    async def ask() -> bytes:
        asyncio.get_running_loop().call_soon(has_gone_on.set)
        return bytes((await app.show_metrics()).body)

    assert asyncio.run(ask()) == b"1"


def test_anybody_may_see_the_pages_and_the_health_and_nothing_else(app: App) -> None:
    routes = [route for route in app.api.routes if isinstance(route, APIRoute)]
    found = {route.path for route in routes if is_open_route(route) and not route.path.startswith("/page/")}
    assert found == OPEN
    described: Any = app.describe()["paths"]
    assert all(
        ("security" in each) == (path in OPEN)
        for path, methods in described.items()
        for each in methods.values()
        if not path.startswith("/page/")
    )


def test_every_problem_of_a_route_is_described_with_its_status(app: App) -> None:
    statuses = {
        int(status)
        for path in app.describe()["paths"].values()
        for each in path.values()
        for status in each["responses"]
    }
    assert {int(status) for status, _ in KINDS.values()} - {405} <= statuses
    assert RETRY_AFTER_S.keys() <= KINDS.keys()


def test_the_documents_show_each_operation_and_escape_what_they_show(app: App) -> None:
    openapi = json.loads(json.dumps(app.describe()))
    openapi["info"]["title"] = "<script>"
    text = build_documents(openapi)
    num_operations = sum(len(path.keys()) for path in openapi["paths"].values())
    assert re.findall("<script[^>]*>", text) == ['<script src="page/docs.js" defer>'] and "&lt;script&gt;" in text
    assert len(re.findall('<form class="try"', text)) == num_operations
    assert len(re.findall("<section>", text)) == num_operations


def test_what_cannot_be_printed_in_a_problem_is_replaced() -> None:
    assert b'"detail":"extension ? and ?"' in Problem("unauthorized", "extension \ud800 and \x1b").build_body()


def test_a_problem_says_what_rfc_9457_asks_for() -> None:
    document = json.loads(Problem("queue-full", "try again").build_body("id"))
    assert document == {
        "type": "urn:image-classifier:problem:queue-full",
        "title": "The queue is full",
        "status": 429,
        "detail": "try again",
        "request_id": "id",
    }
    TypeAdapter(schemas.ProblemDetails).validate_python(document)
