"""Python client of `image_classifier serve`: `Client`, and `AsyncClient` with the same methods as coroutines.

Requests that a server refuses for the moment are sent again; a prediction changes nothing, so this is safe.
"""

from __future__ import annotations

import asyncio
import json
import math
import random
import time
from collections.abc import Generator
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Generic, Self, TypeVar

from image_classifier.credentials import Secret
from image_classifier.errors import ServerError, SettingsError
from image_classifier.extras import load_extra

load_extra("httpx", "client")

import httpx  # noqa: E402  # the line above says what to install

PIXELS = "application/octet-stream"
SIGNATURES = {b"\x89PNG": "image/png", b"\xff\xd8\xff": "image/jpeg", b"RIFF": "image/webp", b"BM": "image/bmp"}
RETRIED = frozenset((408, 429, 502, 503, 504))
FIRST_WAIT_S = 0.2
"""Before the second attempt, where the server says nothing; it doubles with each attempt."""

Image = Path | bytes
"""An image file, or the bytes of one."""

Http = TypeVar("Http", httpx.Client, httpx.AsyncClient)
Result = TypeVar("Result")
Steps = Generator[httpx.Request | float, httpx.Response | httpx.RequestError | None, Result]
"""A conversation: requests to send and seconds to wait, what came of each, and the result. It does no I/O itself."""


@dataclass(frozen=True)
class Score:
    """A class, and the probability that the model gives it."""

    label: str
    probability: float


@dataclass(frozen=True)
class Prediction(Score):
    """The most probable class of an image, and the most probable ones in order."""

    top_k: tuple[Score, ...]


@dataclass(frozen=True)
class Predictions:
    """A prediction for each image of a request, in their order, and the version of the model that gave them."""

    predictions: tuple[Prediction, ...]
    request_id: str
    model_version: str


@dataclass(frozen=True)
class Model:
    """The model that is served; `image_size` in pixels is the side of the images that it takes as pixels."""

    name: str
    version: str
    classes: tuple[str, ...]
    image_size: int


@dataclass(frozen=True, kw_only=True)
class _Settings:
    url: str
    key: Secret | None
    timeout_s: float
    num_retries: int
    max_wait_s: float

    def __post_init__(self) -> None:
        try:
            url = httpx.URL(self.url)
            is_good = url.scheme in ("http", "https") and bool(url.host) and not url.userinfo
        except httpx.InvalidURL:
            is_good = False
        if not is_good:  # which is not repeated: a password may stand in it
            raise SettingsError("url takes an http or https address without a name and password, such as https://host")
        text = self.key.reveal() if self.key else "-"
        if not (text and all("!" <= character <= "~" for character in text)):
            raise SettingsError("key takes printable ASCII characters without spaces")
        if not 0 < self.timeout_s < math.inf:
            raise SettingsError(f"timeout_s takes a number above 0, got: {self.timeout_s!r}")
        if self.num_retries < 0:
            raise SettingsError(f"num_retries takes a whole number of 0 or more, got: {self.num_retries!r}")
        if not 0 <= self.max_wait_s < math.inf:
            raise SettingsError(f"max_wait_s takes a number of 0 or more, got: {self.max_wait_s!r}")

    def build_options(self) -> dict[str, Any]:
        """Build the options of httpx's client; it masks this header where it is shown, and follows no redirect."""
        headers = {"Authorization": f"Bearer {self.key.reveal()}"} if self.key else {}
        return {"base_url": self.url, "headers": headers, "timeout": self.timeout_s}


class _Common(Generic[Http]):
    """What both clients share: what is asked, what is waited for, and what the answers mean."""

    _make: type[Http]

    def __init__(
        self,
        url: str,
        *,
        key: str | None = None,
        timeout_s: float = 10.0,
        num_retries: int = 3,
        max_wait_s: float = 30.0,
    ) -> None:
        """Prepare to ask a server; nothing is sent yet.

        Args:
            url: where it is, such as http://127.0.0.1:8000.
            key: API key or JSON web token.
            timeout_s: seconds to connect, and between two parts of an answer; of one attempt.
            num_retries: attempts after the first one.
            max_wait_s: seconds to wait before an attempt, at most; a server that asks for more is not asked again.

        Raises:
            SettingsError: one of them cannot be.
        """
        secret = None if key is None else Secret(key)
        self._settings = _Settings(
            url=url, key=secret, timeout_s=timeout_s, num_retries=num_retries, max_wait_s=max_wait_s
        )
        self._http: Http = self._make(**self._settings.build_options())

    def _ask(self, request: httpx.Request) -> Steps[httpx.Response]:
        """Send a request until it is answered, or until waiting makes no sense any more."""
        settings = self._settings
        for attempt in range(settings.num_retries + 1):
            outcome = yield request
            is_last = attempt == settings.num_retries
            backoff_s = FIRST_WAIT_S * 2**attempt * random.uniform(0.5, 1)  # nosec B311  # clients that part again
            if isinstance(outcome, httpx.Response):
                wanted_s = read_retry_after(outcome.headers.get("retry-after", ""))
                if outcome.status_code not in RETRIED or is_last or (wanted_s or 0) > settings.max_wait_s:
                    return outcome
                yield min(backoff_s if wanted_s is None else wanted_s, settings.max_wait_s)
            elif is_last:
                assert outcome is not None
                raise ServerError(
                    f"{settings.url} cannot be asked: {str(outcome) or type(outcome).__name__}"
                ) from outcome
            else:
                yield min(backoff_s, settings.max_wait_s)
        raise AssertionError("the last attempt returns or raises")

    def _ask_json(self, request: httpx.Request) -> Steps[Any]:
        answer = yield from self._ask(request)
        if answer.status_code != 200:
            raise explain_refusal(answer)
        return _read_json(answer)

    def _predict(self, images: tuple[Image, ...], top_k: int | None, request_id: str | None) -> Steps[Predictions]:
        contents = [_read_image(image) for image in images]
        if not contents:
            raise SettingsError("predict takes at least one image")
        if len(contents) == 1:
            content, kind = contents[0]
            body: dict[str, Any] = {"content": content, "headers": {"Content-Type": kind}}
        else:
            body = {"files": [("image", ("image", content, kind)) for content, kind in contents]}
        request = self._http.build_request("POST", "/predict", params=_build_query(top_k, request_id), **body)
        return (yield from self._read_predictions(request))

    def _predict_pixels(self, pixels: Any, top_k: int | None, request_id: str | None) -> Steps[Predictions]:
        view = memoryview(pixels)
        if view.format != "B":
            raise SettingsError(f"pixels take unsigned bytes (uint8), got the format {view.format}")
        query, headers = _build_query(top_k, request_id), {"Content-Type": PIXELS}
        request = self._http.build_request("POST", "/predict", params=query, content=view.tobytes(), headers=headers)
        return (yield from self._read_predictions(request))

    def _read_predictions(self, request: httpx.Request) -> Steps[Predictions]:
        document = yield from self._ask_json(request)
        try:
            predictions = tuple(
                Prediction(*_read_score(each), tuple(Score(*_read_score(score)) for score in each["top_k"]))
                for each in document["predictions"]
            )
            return Predictions(predictions, str(document["request_id"]), str(document["model_version"]))
        except (KeyError, TypeError, ValueError) as error:
            raise ServerError("the answer is not one of image_classifier serve; look at url") from error

    def _describe_model(self) -> Steps[Model]:
        facts = yield from self._ask_json(self._http.build_request("GET", "/model"))
        try:
            classes = tuple(map(str, facts["classes"]))
            return Model(str(facts["name"]), str(facts["version"]), classes, int(facts["image_size"]))
        except (KeyError, TypeError, ValueError) as error:
            raise ServerError("the answer is not one of image_classifier serve; look at url") from error


class Client(_Common[httpx.Client]):
    """Asks a server, and waits for its answers.

    ::

        with Client("http://127.0.0.1:8000", key=key) as client:
            print(client.predict(Path("ship.png")).predictions[0].label)

    Threads may share a client. All methods raise `ServerError`: the server cannot be reached, or refuses.
    """

    _make = httpx.Client

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def predict(self, *images: Image, top_k: int | None = None, request_id: str | None = None) -> Predictions:
        """Classify image files, or their bytes: PNG, JPEG, WebP or BMP, all in one request."""
        return self._run(self._predict(images, top_k, request_id))

    def predict_pixels(self, pixels: Any, top_k: int | None = None, request_id: str | None = None) -> Predictions:
        """Classify pixels: uint8 [N, S, S, 3], as bytes or an array of NumPy; S is the model's `image_size`."""
        return self._run(self._predict_pixels(pixels, top_k, request_id))

    def describe_model(self) -> Model:
        """Describe the model that is served."""
        return self._run(self._describe_model())

    def is_ready(self) -> bool:
        """Say whether the server should get requests now; it is asked once."""
        try:
            answer: httpx.Response = self._http.get("/health/ready")
            return answer.status_code == 200
        except httpx.RequestError:
            return False

    def _run(self, steps: Steps[Result]) -> Result:
        outcome: httpx.Response | httpx.RequestError | None = None
        while True:
            try:
                step = steps.send(outcome)
            except StopIteration as end:
                result: Result = end.value
                return result
            outcome = None
            if isinstance(step, float):
                time.sleep(step)
                continue
            try:
                outcome = self._http.send(step)
            except httpx.RequestError as error:
                outcome = error


class AsyncClient(_Common[httpx.AsyncClient]):
    """Asks a server without holding up the event loop; as `Client`, with `async with` and `await`."""

    _make = httpx.AsyncClient

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def predict(self, *images: Image, top_k: int | None = None, request_id: str | None = None) -> Predictions:
        """Classify image files, or their bytes: PNG, JPEG, WebP or BMP, all in one request."""
        return await self._run(self._predict(images, top_k, request_id))

    async def predict_pixels(self, pixels: Any, top_k: int | None = None, request_id: str | None = None) -> Predictions:
        """Classify pixels: uint8 [N, S, S, 3], as bytes or an array of NumPy; S is the model's `image_size`."""
        return await self._run(self._predict_pixels(pixels, top_k, request_id))

    async def describe_model(self) -> Model:
        """Describe the model that is served."""
        return await self._run(self._describe_model())

    async def is_ready(self) -> bool:
        """Say whether the server should get requests now; it is asked once."""
        try:
            answer: httpx.Response = await self._http.get("/health/ready")
            return answer.status_code == 200
        except httpx.RequestError:
            return False

    async def _run(self, steps: Steps[Result]) -> Result:
        outcome: httpx.Response | httpx.RequestError | None = None
        while True:
            try:
                step = steps.send(outcome)
            except StopIteration as end:
                result: Result = end.value
                return result
            outcome = None
            if isinstance(step, float):
                await asyncio.sleep(step)
                continue
            try:
                outcome = await self._http.send(step)
            except httpx.RequestError as error:
                outcome = error


def read_retry_after(text: str) -> float | None:
    """Read a Retry-After header, in seconds from now: whole seconds, or a date; None where it is neither."""
    if text.isascii() and text.isdecimal():
        return float(text[:9])
    try:
        date = parsedate_to_datetime(text)
    except (ValueError, OverflowError):
        return None
    return max(0.0, (date.replace(tzinfo=date.tzinfo or UTC) - datetime.now(UTC)).total_seconds())


def explain_refusal(answer: httpx.Response) -> ServerError:
    """Explain an answer that is no prediction, by its problem details where it has some."""
    problem: Any = None
    if answer.headers.get("content-type", "").startswith("application/problem+json"):
        problem = _read_json(answer)
    problem = problem if isinstance(problem, dict) else {}
    kind = str(problem.get("type", "")).rpartition(":")[2]
    detail = str(problem.get("detail") or answer.reason_phrase or "no reason was given")
    text = "".join(character if character.isprintable() else "?" for character in detail[:500])
    name = f"{answer.status_code} {kind}".strip()
    return ServerError(f"the server refuses with {name}: {text}", status=answer.status_code, kind=kind)


def _read_json(answer: httpx.Response) -> Any:
    try:
        return json.loads(answer.content)
    except (ValueError, RecursionError) as error:
        raise ServerError("the answer is no JSON: it is not of image_classifier serve; look at url") from error


def _read_score(document: Any) -> tuple[str, float]:
    return str(document["class"]), float(document["probability"])


def _read_image(image: Image) -> tuple[bytes, str]:
    """Read the bytes of an image file, and the media type that its first bytes say."""
    name = "the bytes" if isinstance(image, bytes) else str(image)
    try:
        content = image if isinstance(image, bytes) else image.read_bytes()
    except OSError as error:
        raise SettingsError(f"cannot read {name}: {error.strerror}") from error
    for signature, media_type in SIGNATURES.items():
        if content.startswith(signature):
            return content, media_type
    types = ", ".join(SIGNATURES.values())
    raise SettingsError(f"{name}: no image file of {types}; predict_pixels takes pixels")


def _build_query(top_k: int | None, request_id: str | None) -> dict[str, str | int]:
    options = {"top_k": top_k, "request_id": request_id}
    return {name: value for name, value in options.items() if value is not None}
