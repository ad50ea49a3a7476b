"""Bodies and options of requests: what they hold, and what is refused."""

from __future__ import annotations

from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from image_classifier.serving.oip import count_parts, parse_infer
from image_classifier.serving.problems import Problem
from image_classifier.serving.requests import COUNTED_BYTES, Parsed, check_parts, parse_body, parse_options
from tests.serving import draw_images, encode

VALUES: Any = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False) | st.text(max_size=20),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(max_size=10), children, max_size=3),
    max_leaves=8,
)


def parse(content_type: bytes, body: bytes) -> Parsed:
    return parse_body(body, content_type, {}, 4, 32)


@given(st.sampled_from(["images", "top_k", "request_id", "show_input", "other"]), VALUES)
def test_any_json_is_taken_or_refused_with_a_reason(name: str, value: Any) -> None:
    try:
        tickets, _ = parse(b"application/json", orjson.dumps({"images": ["aGk="], name: value}))
    except Problem as problem:
        assert problem.status in (400, 413) and problem.printable.isprintable()
    else:
        assert 1 <= len(tickets) <= 4


@given(st.binary(max_size=200), st.sampled_from([b"multipart/form-data; boundary=x", b"application/json", b"a/b", b""]))
def test_any_bytes_are_taken_or_refused_with_a_reason(body: bytes, content_type: bytes) -> None:
    with pytest.raises(Problem) as caught:
        parse(content_type, b"--x\r\n" + body)
    assert caught.value.status in (400, 413, 415)


@pytest.mark.parametrize(
    ("pairs", "expected"),
    [
        ([("top_k", "3")], (3, "", False)),
        ([("request_id", "a b"), ("show_input", "true")], (5, "a b", True)),
        ([("show_input", "false")], (5, "", False)),
    ],
)
def test_options_are_read_from_text(pairs: list[tuple[str, str]], expected: tuple[Any, ...]) -> None:
    options = parse_options(pairs, "")
    assert (options.top_k, options.request_id, options.show_input) == expected


@pytest.mark.parametrize(
    "pairs",
    [
        *([("top_k", value)] for value in ("", "0", "1.0", "\u0661", "+1", " 1", "1_0", "100000")),
        *([("show_input", value)] for value in ("1", "yes", "")),
        *([("request_id", value)] for value in ("", "a\n", "\u00e9", "a" * 129)),
        [("top_k", "1"), ("top_k", "1")],
        [("a", "")],
    ],
)
def test_other_options_are_refused(pairs: list[tuple[str, str]]) -> None:
    with pytest.raises(Problem) as caught:
        parse_options(pairs, "")
    assert caught.value.status == 400


def test_a_form_holds_images_and_options() -> None:
    image = encode(draw_images(1)[0])
    part = b'--x\r\ncontent-disposition: form-data; name="image"; filename="a"\r\ncontent-type: image/png\r\n\r\n'
    option = b'--x\r\ncontent-disposition: form-data; name="top_k"\r\n\r\n2\r\n'
    tickets, options = parse(
        b"multipart/form-data; boundary=x", part + image + b"\r\n" + option + part + image + b"\r\n--x--\r\n"
    )
    assert options.top_k == 2
    assert [ticket.content for ticket in tickets] == [image, image]
    assert tickets[0].formats == ("PNG",)


def test_compressed_bodies_are_refused() -> None:
    with pytest.raises(Problem) as caught:
        parse_body(b"x", b"image/png", {"content-encoding": "gzip"}, 1, 32)
    assert caught.value.status == 415


@pytest.mark.parametrize("side", [32, 64, 224])
def test_pixels_are_cut_into_images_of_the_models_size(side: int) -> None:
    pixels = [bytes([number]) * 3 * side**2 for number in range(3)]
    tickets, _ = parse_body(b"".join(pixels), b"application/octet-stream", {}, 3, side)
    assert [ticket.pixels for ticket in tickets] == pixels
    for body in (b"", pixels[0][1:], pixels[0] + b"x"):
        with pytest.raises(Problem, match=f"takes {3 * side**2:,} bytes per image: {side} rows of {side} RGB pixels"):
            parse_body(body, b"application/octet-stream", {}, 3, side)
    with pytest.raises(Problem, match="a request may have 2 images"):
        parse_body(b"".join(pixels), b"application/octet-stream", {}, 2, side)


def build_infer(data: object, number: int = 1, side: int = 32) -> bytes:
    """Build the JSON of an inference request."""
    tensor = {"name": "images", "datatype": "UINT8", "shape": [number, side, side, 3], "data": data}
    return orjson.dumps({"inputs": [tensor]})


@pytest.mark.parametrize(("number", "side"), [(64, 32), (1, 64)])
def test_an_inference_request_is_flat_or_nested(number: int, side: int) -> None:
    images = draw_images(number, side=side)
    for data in (images.tolist(), images.ravel().tolist()):
        assert parse_infer(build_infer(data, number, side), None, number, side)[1] == images.tobytes()
        with pytest.raises(Problem, match=r"images takes the shape \[N, 96, 96, 3\]"):
            parse_infer(build_infer(data, number, side), None, number, 96)


@pytest.mark.parametrize(
    "data",
    [
        ["a" * 30_000, *[""] * 10_000],
        [[]] * 3072,
        [None] * 3072,
        [1.0] * 3072,
        [True] * 3072,
        [256] * 3072,
        [[1] * 3072],
        [[[[1, 2, 3]] * 32] * 31 + [[[1, 2, 3]] * 31]],
        [[[[1, 2, 3]] * 31] * 32],
    ],
    ids=[
        *("ragged texts", "empty lists", "nulls", "fractions", "truths", "too large", "half nested"),
        *("ragged rows", "narrow rows"),
    ],
)
def test_what_is_no_image_is_refused_in_one_line(data: object) -> None:
    with pytest.raises(Problem) as caught:
        parse_infer(build_infer(data), None, 64, 32)
    assert caught.value.status in (400, 413) and len(caught.value.detail) <= 200


def test_json_of_more_parts_than_any_request_is_not_parsed() -> None:
    with pytest.raises(Problem, match="too many lists and objects"):
        parse_infer(b"[" * (count_parts(64, 32) + 2000), None, 64, 32)
    assert count_parts(64, 32) == 64 * count_parts(1, 32) and count_parts(64, 224) == count_parts(64, 32)
    images = draw_images(2, side=224)
    assert parse_infer(build_infer(images[:1].tolist(), 1, 224), None, 64, 224)[1] == images[:1].tobytes()
    with pytest.raises(Problem, match="too many values"):
        parse_infer(build_infer(images.tolist(), 2, 224), None, 64, 224)


@pytest.mark.parametrize("place", [0, COUNTED_BYTES - 1, COUNTED_BYTES, 3 * COUNTED_BYTES])
def test_parts_are_counted_wherever_they_are(place: int) -> None:
    body = b" " * place + b"," * 11 + b" " * COUNTED_BYTES
    check_parts(body, 11)
    with pytest.raises(Problem, match="too many values"):
        check_parts(body, 10)
