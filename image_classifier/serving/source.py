"""Loads the served model from a path, a URL or the registry, and loads it again when it changes."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from image_classifier.extras import load_extra
from image_classifier.imaging import give_memory_back
from image_classifier.published.folder import MANIFEST
from image_classifier.published.policy import load_policy
from image_classifier.published.predictor import Predictor, load_predictor
from image_classifier.references import REGISTERED, get_url
from image_classifier.serving.settings import ServerSettings

DEFAULT_NAME = "image_classifier"
WEIGHTS_BYTES = 64 * 2**10
"""Size from which allocations are returned to the system while a model is loaded."""

Resolve = Callable[[str], tuple[Path, str | None]]
"""Maps models:/NAME@ALIAS or a URL to the published folder and the version of the alias."""


class ModelSource:
    """Loads a model, and remembers which version it loaded last.

    Args:
        resolve: looks up registry names and URLs; not used if the model is a path.
        model: path, URL or registry name; by default `settings.model`.
    """

    def __init__(self, settings: ServerSettings, resolve: Resolve | None, model: str = "") -> None:
        self._settings = settings
        self._model = model or settings.model
        is_elsewhere = self._model.startswith(REGISTERED) or get_url(self._model) is not None
        self._resolve = resolve if is_elsewhere else None
        self._loaded: object = None
        self._first: Future[Predictor | None] | None = None

    @property
    def name(self) -> str:
        """Name of the model in the Open Inference Protocol."""
        settings = self._settings
        is_registered = self._model.startswith(REGISTERED)
        registered = self._model.removeprefix(REGISTERED).partition("@")[0] if is_registered else ""
        return settings.model_name or registered or DEFAULT_NAME

    def begin(self) -> None:
        """Start loading in a thread; `load` waits for it. Most of the time goes to the process that tests the model.

        Sources that import more than ONNX Runtime do not start here: two threads must not import one package at once.
        """
        settings = self._settings
        if self._resolve is None and not (settings.public_key or settings.policy):
            load_extra("onnxruntime", "serve")
            pool = ThreadPoolExecutor(1)
            self._first = pool.submit(self._load_if_moved)
            pool.shutdown(wait=False)

    def load(self) -> Predictor:
        """Load the current model.

        Raises:
            ImageClassifierError: it is missing, damaged, not registered, or fails the signature or policy check.
        """
        predictor = self.load_if_moved()
        assert predictor is not None
        return predictor

    def load_if_moved(self) -> Predictor | None:
        """Load the current model if it has changed since the last load; otherwise return None."""
        first, self._first = self._first, None
        predictor = self._load_if_moved() if first is None else first.result()
        if predictor is not None:
            predictor.measure()  # after loading, so that nothing else uses the cores
        return predictor

    def _load_if_moved(self) -> Predictor | None:
        settings = self._settings
        path, version, mark = self._find()
        if mark == self._loaded:
            return None
        give_memory_back(WEIGHTS_BYTES)  # otherwise the heap stays fragmented by the old weights
        try:
            predictor = load_predictor(
                path,
                public_key=settings.public_key,
                policy=load_policy(settings.policy) if settings.policy else None,
                num_threads=1,
                num_lone_threads=settings.count_threads(),
                precision=settings.precision,
                version=version,
            )
        finally:
            give_memory_back()
        self._loaded = mark
        return predictor

    def _find(self) -> tuple[Path, str | None, object]:
        """Find the path, the version if it has a name, and a fingerprint that changes with the model."""
        if self._resolve is not None:
            path, version = self._resolve(self._model)
            return path, version, (path, version)
        path = Path(self._model).resolve()  # follow links, whose target may change
        try:
            facts = (path / MANIFEST if path.is_dir() else path).stat()
        except OSError:
            return path, None, path  # loading reports the error
        return path, None, (path, facts.st_mtime_ns, facts.st_ino, facts.st_size)
