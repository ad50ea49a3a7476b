"""Publishes a finished run: exports, checks parity, describes and signs it, and writes the folder atomically."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from image_classifier import __version__
from image_classifier.choices import Views, describe_views
from image_classifier.data.dataset import load_snapshot
from image_classifier.data.snapshot import Snapshot
from image_classifier.errors import DataError, RunError
from image_classifier.metrics import compute_metrics
from image_classifier.published.attestation import read_attestations
from image_classifier.published.folder import (
    ATTESTATIONS,
    CARD,
    FORMAT_VERSION,
    INT8_MODEL,
    MANIFEST,
    MODEL,
    PARITY,
    PUBLISHED,
    REFERENCE,
    SAMPLES,
    SBOM,
    describe_content,
    serialize_manifest,
)
from image_classifier.published.predictor import Predictor, load_predictor
from image_classifier.published.reference import build_reference, serialize_reference
from image_classifier.publishing.card import CardFacts, build_card
from image_classifier.publishing.onnx import DEFAULT_OPSET, export_model
from image_classifier.publishing.parity import TOLERANCE, check_parity, compute_parity
from image_classifier.publishing.quantize import (
    NUM_CALIBRATION_IMAGES,
    compare_precisions,
    describe_comparison,
    quantize,
)
from image_classifier.publishing.samples import check_num_samples, choose_samples, encode_samples
from image_classifier.publishing.sbom import build_sbom
from image_classifier.publishing.signing import build_signer
from image_classifier.storage import DISK, Disk, locked_folder, storage_error, written_beside
from image_classifier.tracking import checking, layout, reading
from image_classifier.tracking.checkpoint import Model, load_model
from image_classifier.tracking.reading import find_dataset
from image_classifier.training.evaluate import compute_probabilities


@dataclass(frozen=True)
class PublishSettings:
    """How a run is published.

    Attributes:
        views: average the views of the recipe inside the graph; else there is no test-time augmentation.
        opset: version of ONNX's operators.
        license: identifier of the licence of the weights, as Hugging Face spells them.
        sign_key: PEM file of a private key on an elliptic curve, or `keyless`; None signs nothing.
        num_samples: test images to publish with it, for people to try the model on.
        dataset_folder: where the run's data lies, if it moved.
        overwrite: replace what was published of the run before.
    """

    views: bool = False
    opset: int = DEFAULT_OPSET
    license: str = "unknown"
    sign_key: str | None = None
    num_samples: int = 0
    dataset_folder: Path | None = None
    overwrite: bool = False


_DEFAULTS = PublishSettings()


def publish(
    run: Path, settings: PublishSettings = _DEFAULTS, *, say: Callable[[str], None] = print, disk: Disk = DISK
) -> Path:
    """Publish a finished run under its own folder, and return the folder of the published model.

    Args:
        say: told of each stage.

    Raises:
        ImageClassifierError: the run is unfinished or was changed, its data is not there, the key is of another kind,
            the network cannot be exported, or its answers are others, or another process publishes the run; nothing is
            left of what was begun.
    """
    check_num_samples(settings.num_samples)
    checking.check_finished(run)
    busy = RunError(f"another process publishes {run}; wait for it, then check its result")
    try:
        with locked_folder(run, busy):
            return _publish(run, settings, say, disk)
    except OSError as error:
        raise storage_error(run, error) from error


# Over 50 lines: the stages of publishing in their order.
def _publish(run: Path, settings: PublishSettings, say: Callable[[str], None], disk: Disk) -> Path:
    folder = run / PUBLISHED
    record, manifest = _check_run(run)
    if folder.exists() and not settings.overwrite:
        raise RunError(f"{folder} exists already; remove it, or replace it with --overwrite")
    sign = build_signer(settings.sign_key) if settings.sign_key is not None else None
    attestations = _read_attestations(run)
    snapshot = _load_data(run, record, settings.dataset_folder)
    model = load_model(run / layout.MODEL)
    model.check_code(run / layout.MODEL)
    views = model.views if settings.views else "one"
    sbom = build_sbom(record, manifest["weights_digest"])

    say("exporting the network")
    content = export_model(model, views=views, opset=settings.opset)
    with written_beside(folder, disk, replace=settings.overwrite) as temporary:
        files = _Files(temporary, disk)
        files.write(MODEL, content)
        predictor = load_predictor(temporary / MODEL)
        images, labels = snapshot.test

        say(f"comparing its answers with the trainer's on {len(images):,} images")
        lines, answers = _compare(predictor, model, images, views)
        say("quantizing it")
        int8 = _write_quantized(files, predictor, content, snapshot)
        say(describe_comparison(int8))
        proof = {"num_images": len(images), "views": views, "tolerance": TOLERANCE, "fp32": lines, "int8": int8}
        parity: dict[str, Any] = {"format_version": 1, **proof}
        metrics = {"num_images": len(images), **compute_metrics(answers, labels, model.classes)}
        say(_describe_accuracy(metrics["accuracy"], views, reading.read_evaluation(run)))

        facts = CardFacts(
            record=record,
            metrics=metrics,
            parity=parity,
            license=settings.license,
            weights_digest=manifest["weights_digest"],
            views=views,
            opset=settings.opset,
            image_size=predictor.model.image_size,
        )
        files.write_json(PARITY, parity)
        if len(images):
            files.write(REFERENCE, serialize_reference(build_reference(model.classes, images, answers)))
        files.write(CARD, build_card(facts).encode("utf-8", "backslashreplace"))
        files.write(SBOM, sbom)
        described = _describe(facts, manifest["digest"], answers.argmax(axis=1) == labels)
        if settings.num_samples:
            described["samples"] = _write_samples(files, snapshot, settings.num_samples)
        files.write(MANIFEST, serialize_manifest({**described, "files": files.described}))
        if sign is not None:
            say("signing it")
            sign(temporary)
        _write_attestations(temporary / ATTESTATIONS, attestations, disk)
        disk.sync(temporary)
    return folder


def _compare(
    predictor: Predictor, model: Model, images: NDArray[np.uint8], views: Views
) -> tuple[list[dict[str, Any]], NDArray[np.float32]]:
    """Compare the exported model's answers with the network's; return the lines of the proof, and the answers."""
    single_view = compute_probabilities(model.classifier, images)
    expected = single_view if views == "one" else compute_probabilities(model.classifier, images, views=views)
    lines, answers = compute_parity(predictor, images, expected, single_view, views=views)
    check_parity(lines, len(images))
    return lines, answers


def _write_quantized(files: _Files, predictor: Predictor, content: bytes, snapshot: Snapshot) -> dict[str, Any]:
    """Quantize the exported model, and keep it where that is worth it; return what came of it."""
    quantized = quantize(content, snapshot.train[0][:NUM_CALIBRATION_IMAGES])
    files.write(INT8_MODEL, quantized)
    predictors = {"fp32": predictor, "int8": load_predictor(files.folder / INT8_MODEL)}
    compared = compare_precisions(predictors, *snapshot.test)
    is_published = compared["verdict"] is None
    if not is_published:
        files.remove(INT8_MODEL)
    return {"published": is_published, **compared, "bytes": {"fp32": len(content), "int8": len(quantized)}}


def _write_samples(files: _Files, snapshot: Snapshot, num_samples: int) -> list[dict[str, Any]]:
    """Write some test images, and return of each its number and class for the manifest."""
    images, labels = snapshot.test
    chosen = choose_samples(labels, num_samples)
    files.write(SAMPLES, encode_samples(images[chosen]))
    return [{"test_image": int(index), "class": snapshot.classes[labels[index]]} for index in chosen]


def _describe(facts: CardFacts, run_manifest_digest: str, is_right: NDArray[np.bool_]) -> dict[str, Any]:
    """Describe the published model for its manifest, its files left out."""
    record, metrics = facts.record, facts.metrics
    return {
        "format_version": FORMAT_VERSION,
        "experiment_name": record["experiment_name"],
        "run_name": record["run_name"],
        "classes": record["data"]["classes"],
        "views": facts.views,
        "image_size": facts.image_size,
        "opset": facts.opset,
        "data_digest": record["data"]["digest"],
        "code_digest": record["code"]["digest"],
        "weights_digest": facts.weights_digest,
        "run_manifest_digest": run_manifest_digest,
        "package_version": __version__,
        "metrics": {name: metrics[name] for name in ("accuracy", "top5_accuracy", "loss", "num_images")},
        "right": _pack_bits(is_right),
    }


def _read_attestations(run: Path) -> dict[str, bytes]:
    attestations, refused = read_attestations(run)
    if refused:
        name, reason = min(refused.items())
        raise RunError(f"{run / ATTESTATIONS / name} cannot be copied: {reason}; remove it")
    return attestations


def _write_attestations(folder: Path, attestations: dict[str, bytes], disk: Disk) -> None:
    """Write the verdicts of others beside what is signed: no signature is over them, as more may come."""
    if not attestations:
        return
    disk.make_folder(folder)
    for name, attestation in attestations.items():
        disk.write_file(folder / name, attestation)
        disk.sync(folder / name)
    disk.sync(folder)


class _Files:
    """The files of a folder that is being written."""

    def __init__(self, folder: Path, disk: Disk) -> None:
        self.folder = folder
        self.described: dict[str, dict[str, Any]] = {}
        self._disk = disk
        disk.make_folder(folder)

    def write(self, name: str, content: bytes) -> None:
        self._disk.write_file(self.folder / name, content)
        self._disk.sync(self.folder / name)
        self.described[name] = describe_content(content)

    def remove(self, name: str) -> None:
        self._disk.remove(self.folder / name)
        del self.described[name]

    def write_json(self, name: str, content: dict[str, Any]) -> None:
        self.write(name, (json.dumps(content, indent=2, allow_nan=False) + "\n").encode())


def _describe_accuracy(accuracy: float, views: str, evaluation: dict[str, Any]) -> str:
    """Describe the published model's accuracy, beside the run's own where that is of other views."""
    words = f"accuracy {accuracy:.2%} of {evaluation['num_images']:,} test images, {describe_views(views)}"
    if views == evaluation["views"]:
        return words
    return f"{words}; --views publishes the run's {evaluation['accuracy']:.2%}, {describe_views(evaluation['views'])}"


def _pack_bits(is_right: NDArray[np.bool_]) -> str:
    """Pack which test images are classified rightly into hexadecimal digits: two models are compared by them alone."""
    return np.packbits(is_right).tobytes().hex()


def _check_run(run: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Read the record and the manifest of a run of which every file is as it was left."""
    checking.check_finished(run)
    changed = checking.find_changed_files(run)
    if changed:
        raise RunError(f"{run} was changed after the run: {', '.join(changed[:3])} does not match its manifest")
    return reading.read_record(run), reading.read_manifest(run)


def _load_data(run: Path, record: dict[str, Any], dataset_folder: Path | None) -> Snapshot:
    dataset_folder, access, reading = find_dataset(run, dataset_folder)
    snapshot = load_snapshot(dataset_folder, access, reading).recognize(record["data"]["digest"])
    if snapshot.digest != record["data"]["digest"]:
        raise DataError(
            f"{dataset_folder} has data with the digest {snapshot.digest[:12]}, but {run} used "
            f"{record['data']['digest'][:12]}; name the right data with --dataset_folder"
        )
    return snapshot
