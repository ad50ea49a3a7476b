"""The pages in a real Chromium: every way to give an image, keyboard alone, a phone, light and dark, axe-core."""

from __future__ import annotations

import base64
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from playwright.sync_api import Browser, Page, expect, sync_playwright

from image_classifier.imaging import decode_image
from image_classifier.published.folder import describe_content, serialize_manifest
from image_classifier.published.predictor import load_predictor
from image_classifier.publishing.samples import encode_samples
from image_classifier.tracking.reading import read_manifest
from tests.attestations import put, sign, state, write_policy
from tests.conftest import PROJECT, report_lack, require_program
from tests.published import write_keys
from tests.runs import write_run
from tests.serving import CLASSES, Running, draw_images, encode, serving, write_model

KEY = "a key for the page"
IMAGE = np.kron(draw_images(1)[0][:4, :4], np.ones((16, 16, 1), np.uint8))  # 64 x 64


CARD = """---
license: mit
---

# tests/seed-0

A network with `random` weights, and a \\_name\\_ with <b>underscores</b>.

## Results

| class | accuracy |
|---|---|
| a \\| b | 10.00 % |

- one
- two

```bash
image_classifier verify RUN
```
"""
SAMPLES = draw_images(3, seed=5)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A published model that computes in no time, with a card, sample images, and the verdicts of alice and mallory."""
    run = write_run(tmp_path_factory.mktemp("runs"), "tests/seed-0")
    folder = tmp_path_factory.mktemp("published")
    write_model(folder / "model.onnx")
    (folder / "MODEL_CARD.md").write_text(CARD)
    (folder / "samples.png").write_bytes(encode_samples(SAMPLES.transpose(0, 3, 1, 2)))
    described = {path.name: describe_content(path.read_bytes()) for path in folder.iterdir()}
    facts: dict[str, Any] = {
        "experiment_name": "tests",
        "run_name": "seed-0",
        "classes": CLASSES,
        "data_digest": "0" * 64,
    }
    facts |= {"run_manifest_digest": read_manifest(run)["digest"], "format_version": 1}
    samples = [{"test_image": number, "class": CLASSES[number]} for number in range(len(SAMPLES))]
    metrics = {"accuracy": 0.1, "num_images": 10_000}
    manifest = {**facts, "samples": samples, "metrics": metrics, "files": described}
    (folder / "manifest.json").write_bytes(serialize_manifest(manifest))
    alice, _ = write_keys(folder.parent, "alice", ec.SECP256R1())
    mallory, _ = write_keys(folder.parent, "mallory", ec.SECP256R1())
    put(folder, sign(state(run, export=(folder / "model.onnx").read_bytes()), alice))
    put(folder, sign(state(run, family="aarch64 ARM"), mallory))
    return folder


@pytest.fixture(scope="module")
def server(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server that anybody may ask, and that counts the verdicts of alice."""
    policy = write_policy(model.parent / "policy.json", {"alice": model.parent / "alice.pub"})
    with serving(model, tmp_path_factory.mktemp("log") / "log", "--policy", policy) as running:
        yield running


@pytest.fixture(scope="module")
def axe() -> str:
    """The script of the npm package axe-core."""
    path = Path(os.environ.get("AXE_CORE", PROJECT / ".github/scripts/node_modules/axe-core")) / "axe.min.js"
    if not path.is_file():
        report_lack(f"{path} is missing; `npm ci --prefix .github/scripts` installs it")
    return path.read_text(encoding="utf-8")


def find_findings(page: Page, axe: str) -> list[str]:
    """Find what breaks a rule of axe-core on a page as it is shown now, and say that it looked at something."""
    page.evaluate(axe)
    found = page.evaluate("axe.run(document)")
    assert len(found["passes"]) > 20
    return [f"{each['id']}: {[node['html'] for node in each['nodes']]}" for each in found["violations"]]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Debian's Chromium."""
    path = require_program("chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Browser, server: Running) -> Iterator[Page]:
    """The page, of which nothing may fail and which may ask nobody else."""
    with browser.new_context(viewport={"width": 900, "height": 1100}) as context:
        page = context.new_page()
        failures: list[str] = []
        page.on("pageerror", lambda error: failures.append(str(error)))
        page.on("console", lambda message: failures.append(message.text) if message.type == "error" else None)
        page.on("request", lambda request: failures.append(request.url) if is_foreign(request.url, server) else None)
        page.goto(server.url)
        expect(page.locator("#model")).to_contain_text("10 classes")
        yield page
        assert failures == []


def is_foreign(url: str, server: Running) -> bool:
    """Say whether an address is another server's."""
    return not url.startswith((server.url, "blob:", "data:"))


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    """An image file of 64 by 64 pixels."""
    path = tmp_path / "picture.png"
    path.write_bytes(encode(IMAGE))
    return path


def give(page: Page, event: str, content: bytes, kind: str = "image/png") -> None:
    """Drop or paste a file onto the page, as the browser would."""
    script = """([event, content, kind]) => {
        const bytes = Uint8Array.from(atob(content), (letter) => letter.charCodeAt(0));
        const data = new DataTransfer();
        data.items.add(new File([bytes], "image", { type: kind }));
        const options = { bubbles: true, cancelable: true };
        document.querySelector("#drop").dispatchEvent(event === "drop"
            ? new DragEvent("drop", { ...options, dataTransfer: data })
            : new ClipboardEvent("paste", { ...options, clipboardData: data }));
    }"""
    page.evaluate(script, [event, base64.b64encode(content).decode(), kind])


def read_shares(page: Page) -> dict[str, float]:
    """Read the bars: percent by class."""
    rows = [row.split("\n") for row in page.locator("#bars li").all_inner_texts()]
    return {row[0].strip(): float(row[-1].removesuffix(" %")) for row in rows}


def read_canvas(page: Page) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Read the pixels that the page shows as what the network sees."""
    script = "[...document.querySelector('#seen').getContext('2d').getImageData(0, 0, 32, 32).data]"
    return np.array(page.evaluate(script), np.uint8).reshape(32, 32, 4)[:, :, :3]


def test_a_chosen_image_is_shown_as_the_network_sees_it_with_the_models_shares(
    page: Page, picture: Path, model: Path
) -> None:
    page.locator("#file").set_input_files(picture)
    expect(page.locator("#result")).to_be_visible()
    seen = read_canvas(page)
    np.testing.assert_array_equal(seen, decode_image(picture.read_bytes()))
    expected = load_predictor(model).predict(seen[None])[0]
    shares = read_shares(page)
    assert [shares[name] for name in CLASSES] == pytest.approx((100 * expected).tolist(), abs=0.06)
    assert list(shares) == [CLASSES[index] for index in np.argsort(-expected, kind="stable")]
    expect(page.locator("#answer")).to_contain_text(CLASSES[expected.argmax()])
    expect(page.locator("#facts")).to_contain_text(load_predictor(model).model.version)
    widths = [bar.bounding_box()["width"] for bar in page.locator("#bars .bar").all()]  # type: ignore[index]  # shown
    assert widths == sorted(widths, reverse=True) and widths[0] > 1


@pytest.mark.parametrize("event", ["drop", "paste"])
def test_an_image_can_be_dropped_and_pasted(page: Page, event: str) -> None:
    give(page, event, encode(IMAGE))
    expect(page.locator("#bars li")).to_have_count(10)


def test_another_format_is_drawn_by_the_browser(page: Page) -> None:
    give(page, "drop", encode(IMAGE, "GIF"), "image/gif")
    expect(page.locator("#bars li")).to_have_count(10)


@pytest.mark.parametrize("kind", ["image/heic", "text/plain"])
def test_what_is_no_image_is_said_to_be_none(page: Page, kind: str) -> None:
    give(page, "drop", b"no image", kind)
    expect(page.locator("#status")).to_contain_text("an image")
    expect(page.locator("#result")).to_be_hidden()


def test_all_of_it_works_with_the_keyboard(page: Page, picture: Path) -> None:
    page.on("filechooser", lambda chooser: chooser.set_files(picture))
    expect(page.locator("#sample-list button")).to_have_count(3)
    assert step(page) == "choose"  # by which time the browser has heard of the first line
    page.keyboard.press("Enter")
    expect(page.locator("#bars li")).to_have_count(10)
    assert page.evaluate("document.activeElement.id") == "answer"  # where a screen reader goes on
    assert [step(page) for _ in range(3)] == ["classes-title", "verdicts-title", "Model card"]
    page.keyboard.press("Enter")
    expect(page.get_by_role("heading", name="tests/seed-0")).to_be_visible()
    assert [step(page) for _ in range(3)] == ["Results: class, accuracy", "Results: code", "API"]
    for _ in range(6):
        page.keyboard.press("Shift+Tab")
    assert find_focus(page) == "Sample image 3: bird"
    page.keyboard.press("Space")
    expect(page.locator("#truth")).to_be_visible()


def step(page: Page) -> str:
    """Go on to what the next Tab focuses, which shows that it is focused; return its name."""
    page.keyboard.press("Tab")
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    return find_focus(page)


def find_focus(page: Page) -> str:
    """Find the id, label or text of what is focused."""
    script = "(element) => element.id || element.getAttribute('aria-label') || element.textContent"
    return str(page.evaluate(f"({script})(document.activeElement)"))


def test_a_sample_image_is_classified_bit_by_bit_and_its_true_class_is_said(page: Page, model: Path) -> None:
    page.get_by_role("button", name="Sample image 2: automobile").click()
    expect(page.locator("#bars li")).to_have_count(10)
    np.testing.assert_array_equal(read_canvas(page), SAMPLES[1])
    predicted = CLASSES[load_predictor(model).predict(SAMPLES[1][None])[0].argmax()]
    words = "✓ This is its true class." if predicted == "automobile" else "✗ Its true class is automobile."
    expect(page.locator("#truth")).to_have_text(words)


def test_the_page_tells_of_the_model(page: Page) -> None:
    for summary in page.locator("summary").all():
        summary.click()
    assert page.locator("#classes li").all_inner_texts() == list(CLASSES)
    rows = [row.inner_text().split("\t") for row in page.locator("#verdicts tbody tr").all()]
    assert [row[:2] for row in rows] == [["IDENTICAL", "alice"], ["IDENTICAL", "not checked"]]
    card = page.locator("#card")
    assert card.locator("h3").inner_text() == "tests/seed-0" and card.locator("h4").inner_text() == "Results"
    assert card.locator("td").all_inner_texts() == ["a | b", "10.00 %"]
    assert card.locator("li").all_inner_texts() == ["one", "two"]
    assert "a _name_ with <b>underscores</b>." in card.inner_text() and "license" not in card.inner_text()
    expect(page.locator("#about-facts")).to_contain_text("10.0 % of 10,000 images")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_core_finds_nothing_on_the_pages(browser: Browser, server: Running, axe: str, scheme: Any) -> None:
    with browser.new_context(color_scheme=scheme) as context:
        page = context.new_page()
        page.goto(server.url)
        page.get_by_role("button", name="Sample image 1: airplane").click()
        expect(page.locator("#bars li")).to_have_count(10)
        for summary in page.locator("summary").all():
            summary.click()
        assert find_findings(page, axe) == []
        page.goto(f"{server.url}/docs")
        page.locator("summary").first.click()
        page.get_by_role("button", name="Send GET /model", exact=True).click()
        expect(page.locator("pre:visible")).to_contain_text("seed-0")
        assert find_findings(page, axe) == []


def test_axe_core_finds_what_is_wrong(page: Page, axe: str) -> None:
    page.evaluate(
        "document.querySelector('h1').style.color = '#ccc'; document.querySelector('#choose').textContent = ''"
    )
    found = find_findings(page, axe)
    assert [each.partition(":")[0] for each in found] == ["button-name", "color-contrast"]


def test_a_hundred_classes_with_long_names_fit_a_phone(browser: Browser, picture: Path, tmp_path: Path) -> None:
    names = [f"a class whose name has forty letters {number:03d}" for number in range(100)]
    model = write_model(tmp_path / "model.onnx", classes=names)
    with (
        serving(model, tmp_path / "log") as server,
        browser.new_context(viewport={"width": 360, "height": 740}) as context,
    ):
        page = context.new_page()
        page.goto(server.url)
        page.locator("#file").set_input_files(picture)
        expect(page.locator("#bars li:visible")).to_have_count(10)
        page.get_by_role("button", name="Show all 100 classes").click()
        expect(page.locator("#bars li:visible")).to_have_count(100)
        expect(page.locator("#card-details")).to_be_hidden()  # an ONNX file alone has no card, and no samples
        expect(page.locator("#samples")).to_be_hidden()
        page.locator("#classes-title").click()
        assert page.evaluate("document.documentElement.scrollWidth") <= 360
        boxes = [item.bounding_box() for item in page.locator("#bars .name").all()]
        ends = [(box["y"], box["y"] + box["height"]) for box in boxes if box is not None]
        assert all(first[1] <= second[0] for first, second in zip(ends[:-1], ends[1:], strict=True))


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_a_phone_and_can_be_read_in_light_and_dark(
    browser: Browser, server: Running, picture: Path, tmp_path: Path, scheme: Any
) -> None:
    with browser.new_context(
        viewport={"width": 360, "height": 740}, has_touch=True, is_mobile=True, color_scheme=scheme
    ) as context:
        page = context.new_page()
        page.goto(server.url)
        page.locator("#file").set_input_files(picture)
        expect(page.locator("#bars li")).to_have_count(10)
        page.screenshot(path=tmp_path / "page.png", full_page=True)
        assert page.evaluate("document.documentElement.scrollWidth") <= 360
        assert page.locator("#camera").get_attribute("capture") == "environment"
        for name in ("choose", "photograph"):
            box = page.locator(f"#{name}").bounding_box()
            assert box is not None and box["height"] >= 44
        colours = "(element) => [getComputedStyle(element).color, getComputedStyle(element).backgroundColor]"
        ink, paper = page.evaluate(f"({colours})(document.body)")
        assert compute_contrast(ink, paper) > 7


def compute_contrast(first: str, second: str) -> float:
    """Compute the contrast of two CSS colours as WCAG 2 has it."""

    def compute_luminance(colour: str) -> float:
        channels = [int(part) / 255 for part in colour.removeprefix("rgb(").removesuffix(")").split(",")]
        linear = [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    brighter, darker = sorted((compute_luminance(first), compute_luminance(second)), reverse=True)
    return (brighter + 0.05) / (darker + 0.05)


def test_it_asks_for_the_key_and_keeps_the_image_meanwhile(
    browser: Browser, model: Path, picture: Path, tmp_path: Path
) -> None:
    keys = tmp_path / "keys"
    keys.write_text(f"page:{hashlib.sha256(KEY.encode()).hexdigest()}\n")
    with serving(model, tmp_path / "log", "--api_keys_file", keys) as server, browser.new_context() as context:
        page = context.new_page()
        page.goto(server.url)
        page.locator("#file").set_input_files(picture)
        expect(page.locator("#status")).to_contain_text("Enter the key")
        page.locator("#key").fill("wrong")
        page.keyboard.press("Enter")
        expect(page.locator("#status")).to_contain_text("does not accept")
        page.locator("#key").fill(KEY)
        page.keyboard.press("Enter")
        expect(page.locator("#bars li")).to_have_count(10)
        assert page.evaluate("Object.keys(localStorage).length + document.cookie.length") == 0


def test_nothing_from_elsewhere_may_run(browser: Browser, server: Running) -> None:
    with browser.new_context() as context:
        page = context.new_page()
        refused: list[str] = []
        page.on("console", lambda message: refused.append(message.text))
        answer = page.goto(server.url)
        assert answer is not None
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'" in policy and "unsafe" not in policy and "http" not in policy
        script = "{ const script = document.createElement('script'); script.textContent = 'window.ran = true'; "
        assert page.evaluate(f"() => {script} document.body.append(script); return window.ran ?? false }}") is False
        assert any("Content Security Policy" in text for text in refused)


def test_the_documents_send_requests(page: Page, picture: Path, model: Path) -> None:
    page.get_by_role("link", name="API").click()
    expect(page.get_by_role("heading", name="POST /predict")).to_be_visible()
    expected = CLASSES[load_predictor(model).predict(decode_image(picture.read_bytes())[None])[0].argmax()]
    form = page.locator('form[data-path="/predict"]')
    form.get_by_label("top_k").fill("1")
    for kind in ("image/png", "application/json", "multipart/form-data"):
        form.get_by_label("Content-Type").select_option(kind)
        form.get_by_label("file").set_input_files(picture)
        with page.expect_response("**/predict?top_k=1") as answer:
            form.get_by_role("button", name="Send").click()
        assert answer.value.status == 200, kind
        expect(form.get_by_role("status")).to_contain_text("200 OK · application/json")
        assert json.loads(form.locator("pre").inner_text())["predictions"][0]["class"] == expected
    infer = page.locator('form[data-path="/v2/models/{model}/infer"]')
    infer.get_by_role("button", name="Send").click()  # name and pixels are filled in
    expect(infer.locator("pre")).to_contain_text("probabilities")
    samples = page.locator('form[data-path="/samples.png"]')
    samples.get_by_role("button").click()
    expect(samples.locator("img")).to_be_visible()


def test_a_request_can_be_sent_with_the_keyboard(page: Page) -> None:
    page.goto(f"{page.url}docs")
    for _ in range(40):
        if step(page) == "Send GET /model":
            break
    page.keyboard.press("Enter")
    form = page.locator('form[data-path="/model"]')
    expect(form.locator("pre")).to_contain_text("seed-0")
    assert step(page) == "Answer of GET /model"  # which can then be scrolled
