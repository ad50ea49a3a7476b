"""Where a served model comes from: a path, a URL or the registry; loaded at the start, and again when it has moved."""

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
"""Of an allocation that is given back while a model is loaded; afterwards, only those of images are."""

Resolve = Callable[[str], tuple[Path, str | None]]
"""From models:/NAME@ALIAS or a URL to the published folder, and the version that the alias names now."""


class ModelSource:
    """Where the model comes from, and which version of it was loaded last.

    Args:
        resolve: looks up registry names and URLs; not needed where the model is a path.
        model: what it is; by default the settings' model.
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
        """The model's name in the Open Inference Protocol."""
        settings = self._settings
        is_registered = self._model.startswith(REGISTERED)
        registered = self._model.removeprefix(REGISTERED).partition("@")[0] if is_registered else ""
        return settings.model_name or registered or DEFAULT_NAME

    def begin(self) -> None:
        """Begin to load in a thread, for which `load` waits: most of it is a process of its own that tries the model.

        Nothing is begun where that imports more than ONNX Runtime: two threads that import one package may meet in it.
        """
        settings = self._settings
        if self._resolve is None and not (settings.public_key or settings.policy):
            load_extra("onnxruntime", "serve")
            pool = ThreadPoolExecutor(1)
            self._first = pool.submit(self._load_if_moved)
            pool.shutdown(wait=False)

    def load(self) -> Predictor:
        """Load what the name stands for now.

        Raises:
            ImageClassifierError: it is missing, damaged, not signed or verified as asked for, or not registered.
        """
        predictor = self._load_if_moved() if self._first is None else self._first.result()
        assert predictor is not None
        predictor.measure()  # now that nothing else goes on
        return predictor

    def load_if_moved(self) -> Predictor | None:
        """Load what the name stands for now, if that is something else than before."""
        predictor = self._load_if_moved()
        if predictor is not None:
            predictor.measure()
        return predictor

    def _load_if_moved(self) -> Predictor | None:
        settings = self._settings
        path, version, mark = self._find()
        if mark == self._loaded:
            return None
        give_memory_back(WEIGHTS_BYTES)  # the holes between a network's weights would stay the process's memory
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
        """Find the path, the version if it has a name, and what differs when it is another model."""
        if self._resolve is not None:
            path, version = self._resolve(self._model)
            return path, version, (path, version)
        path = Path(self._model).resolve()  # a link may have been pointed somewhere else
        try:
            facts = (path / MANIFEST if path.is_dir() else path).stat()
        except OSError:
            return path, None, path  # loading says what is wrong
        return path, None, (path, facts.st_mtime_ns, facts.st_ino, facts.st_size)
