"""The default workflow: trains a run, returns its test metrics, and publishes it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from image_classifier.access import DATASET_FOLDER
from image_classifier.errors import RunError
from image_classifier.extras import check_extra
from image_classifier.progress import say
from image_classifier.workflow.base import Figure, Workflow

if TYPE_CHECKING:
    from image_classifier.experiment import RunResult
    from image_classifier.settings import RunSettings

FIGURES = ("accuracy", "accuracy_single_view", "top5_accuracy", "loss", "expected_calibration_error", "num_images")
"""Of evaluation.json, that are figures of a run."""


@dataclass(frozen=True, kw_only=True)
class Classification(Workflow):
    """Trains as `image_classifier_trainer` does and saves as `image_classifier publish` does.

    Attributes:
        views: average the recipe's test views inside the published graph.
        opset: version of ONNX's operators, 18 to 23.
        license: licence of the weights, for the card.
        sign_key: private key to sign with (elliptic curve, PEM), or keyless.
    """

    views: bool = False
    opset: int = 20
    license: str = "unknown"
    sign_key: str | None = None

    def check(self) -> None:
        """Check what publishing needs, unless a subclass saves in another way."""
        if type(self).save is not Classification.save:
            return
        for module in ("onnx", "onnxscript", "onnxruntime", "cyclonedx"):
            check_extra(module, "publish")
        if self.sign_key is not None:
            from image_classifier.publishing.signing import build_signer

            build_signer(self.sign_key)

    def load_data(self) -> Path:
        """Return the data set of the trainer's options."""
        return Path(self.training.get("dataset_folder", DATASET_FOLDER))

    def train(self, settings: RunSettings, **how: Any) -> RunResult:
        """Train by `experiment.run`."""
        from image_classifier.experiment import run

        return run(settings, **how)

    def evaluate(self, run: Path) -> dict[str, Figure]:
        """Return what the run's evaluation on the test set says, if all its files are as they were left.

        Raises:
            RunError: one was changed.
        """
        from image_classifier.tracking.checking import check_finished, find_changed_files
        from image_classifier.tracking.reading import read_evaluation

        check_finished(run)
        changed = find_changed_files(run)
        if changed:
            raise RunError(f"{run} was changed after the run: {', '.join(changed[:3])}; restore it, or train again")
        evaluation = read_evaluation(run)
        return {name: evaluation[name] for name in FIGURES}

    def save(self, run: Path) -> Path:
        """Publish the run."""
        from image_classifier.publishing.publish import PublishSettings, publish

        settings = PublishSettings(self.views, self.opset, self.license, self.sign_key, overwrite=True)
        return publish(run, settings, say=say)
