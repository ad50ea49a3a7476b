"""The description of the server: the committed one is the code's, and it names what the server has."""

from __future__ import annotations

import json
import re

from image_classifier.serving.openapi import build_openapi
from image_classifier.serving.problems import KINDS, RETRY_AFTER_S, Problem
from image_classifier.serving.site import PATHS, build_documents
from tests.conftest import PROJECT


def test_the_committed_description_is_the_servers() -> None:
    committed = json.loads((PROJECT / "docs" / "openapi.json").read_text(encoding="utf-8"))
    assert committed == build_openapi(), "python -m image_classifier.serving.openapi > docs/openapi.json"


def test_every_problem_has_its_status_in_the_description() -> None:
    described = {int(status) for status in build_openapi()["components"]["responses"] if status.isdecimal()}
    assert {int(status) for status, _ in KINDS.values()} - {431, 500} == described
    assert RETRY_AFTER_S.keys() <= KINDS.keys()


def test_the_pages_are_described() -> None:
    described = build_openapi()["paths"]
    assert {path for path in PATHS if not path.startswith("/page/")} <= described.keys()


def test_the_documents_show_each_operation_and_escape_what_they_show() -> None:
    openapi = build_openapi()
    openapi["info"]["title"] = "<script>"
    text = build_documents(openapi)
    assert "<script" not in text and "&lt;script&gt;" in text
    num_operations = sum(len(path.keys() - {"parameters"}) for path in openapi["paths"].values())
    assert len(re.findall("<section>", text)) == num_operations


def test_half_a_character_in_a_problem_is_replaced() -> None:
    assert b'"detail":"extension ?"' in Problem("unauthorized", "extension \ud800").build_body()


def test_a_problem_says_what_rfc_9457_asks_for() -> None:
    document = json.loads(Problem("queue-full", "try again").build_body("id"))
    assert document == {
        "type": "urn:image-classifier:problem:queue-full",
        "title": "As many images wait as may wait",
        "status": 429,
        "detail": "try again",
        "request_id": "id",
    }
