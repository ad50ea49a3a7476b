"""The page about a run: self-contained, escaped, and true to the run's files."""

from __future__ import annotations

import base64
import dataclasses
import io
import shlex
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from image_classifier.tracking.trace import Link
from image_classifier.visualization.report import (
    RunFacts,
    Saliency,
    build_report,
    find_confusions,
    find_surest_mistakes,
)
from tests.runs import CLASSES, build_epochs, build_record, compute_evaluation_of, draw_predictions

HOSTILE = "</title><script>alert('&amp;')</script><img src=\"https://example.org/x.png\">${title}"


class Page(HTMLParser):
    """A page as a browser takes it apart: tags with their attributes, and the text between them."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data

    def get_attributes(self, name: str) -> list[str]:
        return [value for _, attributes in self.tags for key, value in attributes.items() if key == name and value]


def build_facts(
    *, classes: tuple[str, ...] = CLASSES, num_epochs: int = 3, accuracy: float = 0.7, name: str = "e/r"
) -> RunFacts:
    probabilities, labels = draw_predictions(accuracy, 200, len(classes))
    chain = [{"step": 100 * e, "digest": f"{e:064x}", "tensors": {}} for e in range(1, num_epochs + 1)]
    return RunFacts(
        path=f"experiments/{name}",
        record=build_record(name, "cifar10", classes, len(labels)),
        epochs=build_epochs(num_epochs),
        evaluation=compute_evaluation_of(probabilities, labels, classes),
        chain=chain,
        manifest={"weights_digest": "a" * 64},
        probabilities=probabilities,
        labels=labels,
    )


def build_images(count: int = 200) -> NDArray[np.uint8]:
    """Images that can be told apart: number i has the brightness i in every pixel."""
    return np.broadcast_to(np.arange(count, dtype=np.uint8)[:, None, None, None], (count, 3, 32, 32))


@pytest.fixture(scope="module")
def html() -> str:
    return build_report(build_facts(), build_images())


def test_the_page_needs_nothing_but_itself(html: str) -> None:
    page = Page(html)

    names = {tag for tag, _ in page.tags}
    assert not names & {"script", "link", "iframe", "object", "embed", "base", "form"}
    sources = page.get_attributes("src") + page.get_attributes("srcset")
    assert len(sources) == 6 + 24
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert not page.get_attributes("href")
    assert not any(key.startswith("on") for _, attributes in page.tags for key in attributes)
    (policy,) = [a["content"] for _, a in page.tags if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy is not None and policy.startswith("default-src 'none'")


def decode_source(source: str | None) -> Image.Image:
    assert source is not None
    return Image.open(io.BytesIO(base64.b64decode(source.removeprefix("data:image/png;base64,"))))


def test_each_figure_has_a_light_and_a_dark_picture_and_a_description(html: str) -> None:
    page = Page(html)
    dark = [attributes for tag, attributes in page.tags if tag == "source"]
    light = [attributes for _, attributes in page.tags if attributes.get("class") == "figure"]
    assert len(light) == len(dark) == 3
    for attributes in light:
        assert decode_source(attributes["src"]).convert("L").getpixel((0, 0)) == 255
        assert len(attributes["alt"] or "") > 20
    for attributes in dark:
        assert attributes["media"] == "(prefers-color-scheme: dark)"
        assert decode_source(attributes["srcset"]).convert("RGB").getpixel((0, 0)) == (0x16, 0x1B, 0x22)


def test_names_are_text_wherever_they_are_shown(html: str) -> None:
    classes = (HOSTILE, "<b>", "name & \"quotes' ")
    facts = build_facts(classes=classes, name=f"{HOSTILE}/{HOSTILE}")
    record = facts.record | {
        "data": facts.record["data"] | {"name": HOSTILE},
        "pretrained": {"path": HOSTILE, "digest": HOSTILE},
        "settings": facts.record["settings"] | {HOSTILE: HOSTILE},
        "changes": [{"resumed_at": HOSTILE, "code": HOSTILE}],
        "started_at": HOSTILE,
    }
    facts = dataclasses.replace(facts, record=record, manifest={"weights_digest": HOSTILE})

    hostile = build_report(facts, build_images())
    page, plain = Page(hostile), Page(html)

    assert {tag for tag, _ in page.tags} == {tag for tag, _ in plain.tags}
    assert {key for _, attributes in page.tags for key in attributes} == {
        key for _, attributes in plain.tags for key in attributes
    }
    assert "<script" not in hostile and 'example.org/x.png">' not in hostile
    assert page.text.count(HOSTILE) > 20


def test_the_page_says_what_the_run_is_and_how_to_check_it() -> None:
    facts = build_facts(name="my experiment/it's a run")

    text = Page(build_report(facts, build_images())).text

    for part in ("data", "code", "environment", "machine"):
        assert facts.record[part]["digest"] in text
    assert f"at step 300: {3:064x}" in text
    assert "a" * 64 in text
    assert f"image_classifier verify {shlex.quote(facts.path)}" in text
    assert "image_classifier verify --files_only" in text
    for name, value in facts.record["settings"].items():
        assert name in text
        assert isinstance(value, list) or str(value) in text
    assert f"{100 * facts.evaluation['accuracy']:.2f} %" in text


def test_the_surest_mistakes_are_shown_with_their_images(html: str) -> None:
    facts = build_facts()
    indices = find_surest_mistakes(facts.probabilities, facts.labels)

    page = Page(html)

    shown = [a for tag, a in page.tags if tag == "img" and (a.get("alt") or "").startswith("test image ")]
    assert [f"test image {i}: {CLASSES[facts.labels[i]]}" for i in indices] == [a["alt"] for a in shown]
    for index, attributes in zip(indices, shown, strict=True):
        image = decode_source(attributes["src"])
        assert image.size == (32, 32)
        assert image.getpixel((5, 5)) == (index, index, index)


def test_saliency_is_shown_where_it_was_asked_for(html: str) -> None:
    facts = build_facts()
    maps = {0: np.eye(32, dtype=np.float32), 3: np.zeros((32, 32), np.float32)}

    page = Page(build_report(facts, build_images(), [Saliency(7, maps)]))

    shown = {a["alt"]: a["src"] for tag, a in page.tags if tag == "img" and "saliency" in (a.get("alt") or "")}
    assert list(shown) == ["saliency of test image 7 for plane", "saliency of test image 7 for cat"]
    bright, dark = (np.asarray(decode_source(source)).astype(int).sum(axis=2) for source in shown.values())
    assert bright[4, 4] > 2 * bright[4, 5] and bright[4, 5] == dark[0, 0]
    assert "Saliency" not in Page(html).text


def test_metrics_that_say_nothing_are_left_out(html: str) -> None:
    assert "top-5 accuracy" in html and html.count("test accuracy, ") == 1  # there is one view alone
    assert "top-5 accuracy" not in build_report(build_facts(classes=("a", "b", "c")), "no images")


def test_of_very_many_classes_the_order_is_listed() -> None:
    names = tuple(f"class {number}" for number in range(130))
    assert "The classes in the order of the matrix" in build_report(build_facts(classes=names), "no images")


def test_mistakes_are_the_wrong_ones_surest_first() -> None:
    probabilities, labels = draw_predictions(0.6, 300, 5)
    wrong = [
        (float(row.max()), index)
        for index, (row, label) in enumerate(zip(probabilities, labels, strict=True))
        if row.argmax() != label
    ]
    expected = [index for _, index in sorted(wrong, key=lambda pair: (-pair[0], pair[1]))]

    assert find_surest_mistakes(probabilities, labels, 10) == expected[:10]
    assert find_surest_mistakes(probabilities, labels, 1000) == expected


def test_confusions_are_counted_from_the_true_class() -> None:
    evaluation: dict[str, Any] = {
        "per_class": {"a": {}, "b": {}, "c": {}},
        "confusion_matrix": [[9, 1, 0], [4, 5, 2], [0, 0, 7]],
    }
    assert find_confusions(evaluation) == [("b", "a", 4), ("b", "c", 2), ("a", "b", 1)]
    assert find_confusions(evaluation, 1) == [("b", "a", 4)]


def test_what_is_missing_is_said() -> None:
    untrained = Page(build_report(build_facts(num_epochs=0), "the <data> set has moved")).text
    assert "Nothing was trained, so there are no curves." in untrained
    assert "There is no digest chain" in untrained
    assert "The test images cannot be shown: the <data> set has moved" in untrained
    perfect = Page(build_report(build_facts(accuracy=1.0), build_images())).text
    assert perfect.count("No test image is misclassified.") == 2


def test_a_class_without_images_has_a_dash() -> None:
    facts = build_facts(classes=("a", "b"))
    probabilities = np.pad(facts.probabilities, ((0, 0), (0, 1)))
    evaluation = compute_evaluation_of(probabilities, facts.labels, ["a", "b", "none"])
    facts = dataclasses.replace(facts, probabilities=probabilities, evaluation=evaluation)

    assert "none–––0" in Page(build_report(facts, "no images")).text


def test_breaks_and_changes_are_said() -> None:
    facts = build_facts()
    single = dataclasses.replace(facts, chain=facts.chain[:1])
    assert "1 digest of the whole state<" in build_report(single, "no images")
    chain = [*facts.chain, {"step": 300, "digest": "b" * 64, "break": {"processor": "another"}}]
    changes = [{"resumed_at": "2026-01-02", "machine": "processor was one, is another"}]
    facts = dataclasses.replace(facts, chain=chain, record=facts.record | {"changes": changes})

    text = Page(build_report(facts, "no images")).text

    assert "4 digests of the whole state, each over the one before it, 1 of them for a change of the machine" in text
    assert "resumed 2026-01-02 with another machine: processor was one, is another" in text


def test_the_same_run_gives_the_same_page(html: str) -> None:
    assert build_report(build_facts(), build_images()) == html


def test_where_a_run_comes_from_is_drawn_with_what_was_checked() -> None:
    links = [Link("run", "a <b>", "0" * 64, "equal", "all files"), Link("data", "c", "", "different", "another")]
    page = build_report(dataclasses.replace(build_facts(), links=links), "none")
    assert "a &lt;b&gt;" in page and '<li class="different"><b>\u2717 data: different</b>' in page
    assert "Provenance" not in build_report(build_facts(), "no images")
