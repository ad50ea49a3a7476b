"""Conformance tests for networks: the checks at the start of a run, and those for publishing."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
from torch import nn

from image_classifier import conformance
from image_classifier.errors import ImageClassifierError
from image_classifier.model.catalog import build_classifier_by
from image_classifier.published.predictor import build_predictor
from image_classifier.publishing.onnx import export_model
from image_classifier.publishing.parity import TOLERANCE
from image_classifier.settings import TrainingSettings
from image_classifier.tracking.checkpoint import Model
from image_classifier.training.determinism import configure_torch
from image_classifier.training.evaluate import compute_probabilities

BATCH_SIZES = (1, 3)
NETWORK = "the network"


def check_network(build: Callable[..., nn.Module], *, image_size: int = 32, num_classes: int = 10) -> None:
    """Check that a network can be trained, resumed, verified and published.

    It is built twice from one seed, answers images and takes steps, and is exported to ONNX, which needs the extra
    `publish`. Torch computes deterministically from then on.

    Args:
        build: what `--model` would name: `build(num_classes=..., image_size=...)`.
        image_size: side in pixels that the network is used at; from 16 to 224.

    Raises:
        AssertionError: the network fails; the message says in what.
    """
    how = {"device": "cpu", "engine": "eager", "precision": "fp32", "image_sizes": (image_size,)}
    settings = TrainingSettings.from_recipe("notebook", model="network:build", **how)
    build_classifier = partial(
        build_classifier_by,
        build,
        NETWORK,
        num_classes,
        input_mean=(0.5,) * 3,
        input_std=(0.25,) * 3,
        image_size=image_size,
    )
    configure_torch()
    try:
        conformance.check_network(partial(build_classifier, seed=0), settings, num_classes, NETWORK)
        classes = tuple(f"class {number}" for number in range(num_classes))
        run = dict.fromkeys(("experiment_name", "run_name", "data_digest", "code_digest"), "none")
        classifier = build_classifier(seed=0).eval()
        predictor = build_predictor(export_model(Model(classifier, NETWORK, classes, "one", run)), Path(NETWORK))
    except ImageClassifierError as error:
        raise AssertionError(str(error)) from error
    for number in BATCH_SIZES:
        images = np.random.default_rng(number).integers(0, 256, (number, 3, 32, 32), dtype=np.uint8)
        answers = predictor.predict(np.ascontiguousarray(images.transpose(0, 2, 3, 1)))
        apart = float(np.abs(answers - compute_probabilities(classifier, images)).max())
        if not apart <= TOLERANCE:
            raise AssertionError(
                f"{NETWORK} gives other answers when it is exported: they are {apart:.3g} apart for {number} images"
            )
