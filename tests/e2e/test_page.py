"""The page in a real Chromium: dropped, pasted and chosen images, with the keyboard, on a phone, light and dark."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

from image_classifier.imaging import decode_image
from image_classifier.published.predictor import load_predictor
from tests.conftest import require_program
from tests.serving import CLASSES, Running, draw_images, encode, serving, write_model

KEY = "a key for the page"
IMAGE = np.kron(draw_images(1)[0][:4, :4], np.ones((16, 16, 1), np.uint8))  # 64 x 64


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that computes in no time."""
    return write_model(tmp_path_factory.mktemp("model") / "model.onnx")


@pytest.fixture(scope="module")
def server(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server that anybody may ask."""
    with serving(model, tmp_path_factory.mktemp("log") / "log") as running:
        yield running


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
    expect(page.locator("#status")).to_contain_text("no image")
    expect(page.locator("#result")).to_be_hidden()


def test_all_of_it_works_with_the_keyboard(page: Page, picture: Path) -> None:
    page.on("filechooser", lambda chooser: chooser.set_files(picture))
    page.keyboard.press("Tab")
    assert (
        page.evaluate("document.activeElement.id") == "choose"
    )  # by which time the browser has heard of the line above
    page.keyboard.press("Enter")
    expect(page.locator("#bars li")).to_have_count(10)
    assert page.evaluate("document.activeElement.id") == "answer"  # where a screen reader goes on


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
        expect(page.locator("#status")).to_contain_text("not known")
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


def test_the_documents_can_be_read(page: Page, server: Running) -> None:
    page.get_by_role("link", name="API").click()
    expect(page.get_by_role("heading", name="POST /predict")).to_be_visible()
