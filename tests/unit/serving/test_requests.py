"""Bodies and options of requests: what they hold, and what is refused."""

from __future__ import annotations

from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from image_classifier.serving.problems import Problem
from image_classifier.serving.requests import PredictRequest, parse_body, parse_query
from tests.serving import draw_images, encode

VALUES: Any = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False) | st.text(max_size=20),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(max_size=10), children, max_size=3),
    max_leaves=8,
)


def parse(content_type: bytes, body: bytes) -> PredictRequest:
    request = PredictRequest()
    parse_body(content_type, {}, body, request, max_images=4)
    return request


@given(st.sampled_from(["images", "top_k", "request_id", "show_input", "other"]), VALUES)
def test_any_json_is_taken_or_refused_with_a_reason(name: str, value: Any) -> None:
    try:
        request = parse(b"application/json", orjson.dumps({"images": ["aGk="], name: value}))
    except Problem as problem:
        assert problem.status in (400, 413) and problem.detail.isprintable()
    else:
        assert 1 <= len(request.tickets) <= 4


@given(st.binary(max_size=200), st.sampled_from([b"multipart/form-data; boundary=x", b"application/json", b"a/b", b""]))
def test_any_bytes_are_taken_or_refused_with_a_reason(body: bytes, content_type: bytes) -> None:
    with pytest.raises(Problem) as caught:
        parse(content_type, b"--x\r\n" + body)
    assert caught.value.status in (400, 413, 415)


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        (b"top_k=3", (3, None, False)),
        (b"request_id=a%20b&show_input=true", (None, "a b", True)),
        (b"show_input=false", (None, None, False)),
    ],
)
def test_options_are_read_from_the_query(query: bytes, expected: tuple[Any, ...]) -> None:
    request = PredictRequest()
    parse_query(query, request)
    assert (request.top_k, request.request_id, request.show_input) == expected


@pytest.mark.parametrize(
    "query",
    [
        *(b"top_k=", b"top_k=0", b"top_k=1.0", b"top_k=%D9%A1", b"top_k=1&top_k=1", b"request_id=%0a", b"show_input=1"),
        *(b"=", b"a", b"\xff", b"&".join([b"a=b"] * 20)),
    ],
)
def test_other_options_are_refused(query: bytes) -> None:
    with pytest.raises(Problem) as caught:
        parse_query(query, PredictRequest())
    assert caught.value.status == 400


def test_a_form_holds_images_and_options() -> None:
    image = encode(draw_images(1)[0])
    part = b'--x\r\ncontent-disposition: form-data; name="image"; filename="a"\r\ncontent-type: image/png\r\n\r\n'
    option = b'--x\r\ncontent-disposition: form-data; name="top_k"\r\n\r\n2\r\n'
    request = parse(
        b"multipart/form-data; boundary=x", part + image + b"\r\n" + option + part + image + b"\r\n--x--\r\n"
    )
    assert request.top_k == 2
    assert [ticket.content for ticket in request.tickets] == [image, image]
    assert request.tickets[0].formats == ("PNG",)


def test_compressed_bodies_are_refused() -> None:
    with pytest.raises(Problem) as caught:
        parse_body(b"image/png", {b"content-encoding": b"gzip"}, b"x", PredictRequest(), max_images=1)
    assert caught.value.status == 415
