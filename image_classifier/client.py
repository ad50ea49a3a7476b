"""Python client of `image_classifier serve`: `Client`, and `AsyncClient` with the same methods as coroutines.

Requests that the server refuses temporarily are retried, which is safe because a prediction changes nothing.
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

import httpx  # noqa: E402  # the line above tells what to install

PIXELS = "application/octet-stream"
SIGNATURES = {b"\x89PNG": "image/png", b"\xff\xd8\xff": "image/jpeg", b"RIFF": "image/webp", b"BM": "image/bmp"}
RETRIED = frozenset((408, 429, 502, 503, 504))
FIRST_WAIT_S = 0.2
"""Wait before the second attempt if the server gives no Retry-After; it doubles with each attempt."""

Image = Path | bytes
"""Path or content of an image file."""

Http = TypeVar("Http", httpx.Client, httpx.AsyncClient)
Result = TypeVar("Result")
Steps = Generator[httpx.Request | float, httpx.Response | httpx.RequestError | None, Result]
"""A generator without I/O: yields requests to send or seconds to wait, receives outcomes, and returns the result."""


@dataclass(frozen=True)
class Score:
    """A class and its probability."""

    label: str
    probability: float


@dataclass(frozen=True)
class Prediction(Score):
    """The most probable class of an image, and the top k classes."""

    top_k: tuple[Score, ...]


@dataclass(frozen=True)
class Predictions:
    """One prediction per image, in the order of the request, and the version of the model."""

    predictions: tuple[Prediction, ...]
    request_id: str
    model_version: str


@dataclass(frozen=True)
class Model:
    """The served model.

    Attributes:
        image_size: side of the input in pixels.
    """

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
        if not is_good:  # not repeated in the message: it may contain a password
            raise SettingsError("url takes an http or https URL without user name and password, such as https://host")
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
        """Build the options of httpx's client, which masks this header in its output and follows no redirects."""
        headers = {"Authorization": f"Bearer {self.key.reveal()}"} if self.key else {}
        return {"base_url": self.url, "headers": headers, "timeout": self.timeout_s}


class _Common(Generic[Http]):
    """What both clients share: requests, retries, and parsing of answers."""

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
        """Create a client without connecting.

        Args:
            url: of the server, such as http://127.0.0.1:8000.
            key: API key or JSON Web Token.
            timeout_s: timeout in seconds to connect, and between two parts of an answer, per attempt.
            num_retries: attempts after the first one.
            max_wait_s: maximum seconds to wait before an attempt. If the server asks for more, the request fails.

        Raises:
            SettingsError: an argument is invalid.
        """
        secret = None if key is None else Secret(key)
        self._settings = _Settings(
            url=url, key=secret, timeout_s=timeout_s, num_retries=num_retries, max_wait_s=max_wait_s
        )
        self._http: Http = self._make(**self._settings.build_options())

    def _ask(self, request: httpx.Request) -> Steps[httpx.Response]:
        """Send a request until it succeeds, fails permanently, or the retries are used up."""
        settings = self._settings
        for attempt in range(settings.num_retries + 1):
            outcome = yield request
            is_last = attempt == settings.num_retries
            backoff_s = FIRST_WAIT_S * 2**attempt * random.uniform(0.5, 1)  # nosec B311  # jitter
            if isinstance(outcome, httpx.Response):
                wanted_s = read_retry_after(outcome.headers.get("retry-after", ""))
                if outcome.status_code not in RETRIED or is_last or (wanted_s or 0) > settings.max_wait_s:
                    return outcome
                yield min(backoff_s if wanted_s is None else wanted_s, settings.max_wait_s)
            elif is_last:
                assert outcome is not None
                raise ServerError(
                    f"{settings.url} cannot be reached: {str(outcome) or type(outcome).__name__}"
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
            raise ServerError("the answer is not from image_classifier serve; check url") from error

    def _describe_model(self) -> Steps[Model]:
        facts = yield from self._ask_json(self._http.build_request("GET", "/model"))
        try:
            classes = tuple(map(str, facts["classes"]))
            return Model(str(facts["name"]), str(facts["version"]), classes, int(facts["image_size"]))
        except (KeyError, TypeError, ValueError) as error:
            raise ServerError("the answer is not from image_classifier serve; check url") from error


class Client(_Common[httpx.Client]):
    """A synchronous client.

    ::

        with Client("http://127.0.0.1:8000", key=key) as client:
            print(client.predict(Path("ship.png")).predictions[0].label)

    It is thread-safe. All methods raise `ServerError` if the server cannot be reached or refuses a request.
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
        """Classify images, given as paths or file contents (PNG, JPEG, WebP or BMP), in one request."""
        return self._run(self._predict(images, top_k, request_id))

    def predict_pixels(self, pixels: Any, top_k: int | None = None, request_id: str | None = None) -> Predictions:
        """Classify raw pixels, uint8 [N, S, S, 3], as bytes or a NumPy array; S is the model's `image_size`."""
        return self._run(self._predict_pixels(pixels, top_k, request_id))

    def describe_model(self) -> Model:
        """Describe the served model."""
        return self._run(self._describe_model())

    def is_ready(self) -> bool:
        """Return whether the server is ready for requests, without retries."""
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
    """An asynchronous client; as `Client`, with `async with` and `await`."""

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
        """Classify images, given as paths or file contents (PNG, JPEG, WebP or BMP), in one request."""
        return await self._run(self._predict(images, top_k, request_id))

    async def predict_pixels(self, pixels: Any, top_k: int | None = None, request_id: str | None = None) -> Predictions:
        """Classify raw pixels, uint8 [N, S, S, 3], as bytes or a NumPy array; S is the model's `image_size`."""
        return await self._run(self._predict_pixels(pixels, top_k, request_id))

    async def describe_model(self) -> Model:
        """Describe the served model."""
        return await self._run(self._describe_model())

    async def is_ready(self) -> bool:
        """Return whether the server is ready for requests, without retries."""
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
    """Parse a Retry-After header (seconds or a date) to seconds from now; None if it is invalid."""
    if text.isascii() and text.isdecimal():
        return float(text[:9])
    try:
        date = parsedate_to_datetime(text)
    except (ValueError, OverflowError):
        return None
    return max(0.0, (date.replace(tzinfo=date.tzinfo or UTC) - datetime.now(UTC)).total_seconds())


def explain_refusal(answer: httpx.Response) -> ServerError:
    """Convert an error answer to an exception, with its problem details if it has them."""
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
        raise ServerError("the answer is not JSON, so it is not from image_classifier serve; check url") from error


def _read_score(document: Any) -> tuple[str, float]:
    return str(document["class"]), float(document["probability"])


def _read_image(image: Image) -> tuple[bytes, str]:
    """Read an image file, and detect its media type by the first bytes."""
    name = "the bytes" if isinstance(image, bytes) else str(image)
    try:
        content = image if isinstance(image, bytes) else image.read_bytes()
    except OSError as error:
        raise SettingsError(f"cannot read {name}: {error.strerror}") from error
    for signature, media_type in SIGNATURES.items():
        if content.startswith(signature):
            return content, media_type
    types = ", ".join(SIGNATURES.values())
    raise SettingsError(f"{name}: not an image file of the types {types}; predict_pixels takes pixels")


def _build_query(top_k: int | None, request_id: str | None) -> dict[str, str | int]:
    options = {"top_k": top_k, "request_id": request_id}
    return {name: value for name, value in options.items() if value is not None}
