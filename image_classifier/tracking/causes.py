"""The probable cause of a difference between two runs, from their records and the first difference."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from image_classifier.settings import update_recorded_settings
from image_classifier.tracking.divergence import TensorDifference
from image_classifier.tracking.identity import compute_tensor_digest, find_differing_keys
from image_classifier.tracking.record import find_identity_changes
from image_classifier.training.watching import RATE, Result

Kind = Literal[
    "setting",
    "library",
    "instruction set",
    "reduction order",
    "threads",
    "data",
    "image order",
    "augmentation",
    "learning rate",
    "initialisation",
    "code",
    "memory",
    "unknown",
]

_ORDER = {"seed", "sampler", "batch_size", "validation_fraction"}
_IMAGES = {"flip", "translate", "cutout", "color_jitter", "rand_augment", "mixup", "cutmix", "label_smoothing"}
_ARITHMETIC = {"engine", "precision", "instruction_set", "device", "shards", "batch_size", "model", "image_sizes"}
_SCHEDULE = {"learning_rate", "schedule", "warmup_fraction", "num_epochs", "batch_size"}
_OF_PHASE = {
    "state before": {"seed", "model", "input_mean", "input_std", "image_sizes", "freeze", "batch_size"},
    "batch": _ORDER | _IMAGES | {"class_weights"},
    "forward": _ARITHMETIC | {"label_smoothing", "class_weights", "seed", "freeze"},
    "update": {"optimizer", "momentum", "nesterov", "weight_decay", "learning_rate", "body_learning_rate", "ema_decay"},
}
_OF_PHASE["backward"] = _OF_PHASE["gradient"] = _OF_PHASE["forward"]
_OF_PHASE["update"] |= _ARITHMETIC
"""Settings that can make a result of a phase another."""

MOSTLY = 0.5
"""Of an image's values: if more differ, it is another image rather than a changed one."""

UNEXPLAINED = "nothing that the records have explains it"

_NO_EFFECT = {"digest_every", "views"}
"""Settings that change no weights while training."""

_KINDS: dict[str, Kind] = {
    "engine": "library",
    "device": "library",
    "instruction_set": "instruction set",
    "shards": "reduction order",
    "environment": "library",
    "machine": "instruction set",
    "data": "data",
    "code": "code",
    "plugins": "code",
    "pretrained": "initialisation",
}
"""What a setting, or a part of a run's identity, is as a cause; another setting is simply one."""

_PARTS: dict[str, tuple[str, ...]] = {
    "state before": ("pretrained", "data", "code", "plugins", "environment", "machine"),
    "batch": ("data", "code", "environment"),
    "forward": ("machine", "environment", "plugins", "code"),
    "update": ("machine", "environment", "plugins", "code"),
}
_PARTS["backward"] = _PARTS["gradient"] = _PARTS["forward"]
"""Parts of the identity that can make a result of a phase another, the likeliest first."""
_ALL_PARTS: tuple[str, ...] = ("pretrained", "data", "machine", "environment", "plugins", "code")


@dataclass(frozen=True)
class Evidence:
    """What is known of a difference.

    Attributes:
        records: of both runs; the same one twice where a run was held against this machine.
        step: that it is at.
        result: the first that differs; None where the step was not seen.
        values: how far apart that is, or the first tensor of the state.
        batches: what the step was taken on, where it was seen.
        tensors: of the state that differ after the step.
        state: the names of all its tensors.
        changed: what is not here as it was recorded, by setting or part of the identity.
    """

    records: tuple[dict[str, Any], dict[str, Any]]
    step: int
    result: Result | None = None
    values: TensorDifference | None = None
    batches: tuple[Mapping[str, Tensor], Mapping[str, Tensor]] = ({}, {})
    tensors: Sequence[str] = ()
    state: Sequence[str] = ()
    changed: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Cause:
    """What a difference probably comes of.

    Attributes:
        kind: of cause.
        reason: why that is probable.
        differences: of the two records, a line each.
    """

    kind: Kind
    reason: str
    differences: tuple[str, ...]


def find_cause(evidence: Evidence) -> Cause:
    """Find what a difference at a step probably comes of."""
    settings = list_differing_settings(*evidence.records)
    parts = {part: what for part, what in find_identity_changes(*evidence.records).items() if part != "settings"}
    for name, what in evidence.changed.items():
        (parts if name in _ALL_PARTS else settings)[name] = what
    kind, reason = _judge(evidence, settings, parts)
    lines = [*settings.values(), *(f"{part}: {what}" for part, what in parts.items())]
    threads = [str(record["execution"].get("num_threads", "unknown")) for record in evidence.records]
    if threads[0] != threads[1]:
        lines.append(f"--num_threads is {' and '.join(threads)}, which should change no bit")
        if kind == "unknown":
            kind, reason = "threads", f"nothing else that the records have differs{reason[len(UNEXPLAINED):]}"
    return Cause(kind, reason, tuple(lines))


def list_differing_settings(first: dict[str, Any], second: dict[str, Any]) -> dict[str, str]:
    """List the settings that differ and can change weights, each in words."""
    old, new = (update_recorded_settings(record["settings"]) for record in (first, second))
    return {
        name: f"--{name} is {old.get(name)} and {new.get(name)}"
        for name in find_differing_keys(old, new)
        if name not in _NO_EFFECT
    }


def _judge(evidence: Evidence, settings: Mapping[str, str], parts: Mapping[str, str]) -> tuple[Kind, str]:
    """Name the kind of cause, and why."""
    result, values = evidence.result, evidence.values
    unknown, seen = _describe_seen(evidence)
    phase = None if result is None else result.phase
    is_one_bit = values is not None and values.bit is not None
    if is_one_bit and (phase == "update" or (phase is None and len(evidence.tensors) == 1)):
        return "memory", "one bit of one value differs, and of what computed it nothing does: a bit was flipped"
    fitting, likely = set(settings), _ALL_PARTS
    if result is not None:
        fitting &= _SCHEDULE if result.layer == RATE else _OF_PHASE[result.phase]
        likely = _PARTS[result.phase]
    for name in sorted(fitting, key=lambda name: (name not in _KINDS, name)):
        return _KINDS.get(name, "setting"), settings[name] + seen * (unknown != "unknown")
    for part in likely:
        if part in parts:
            return _KINDS[part], f"{part}: {parts[part]}" + seen * (unknown != "unknown")
    return unknown, f"{UNEXPLAINED}{seen}"


def _describe_seen(evidence: Evidence) -> tuple[Kind, str]:
    """Describe what was seen of the step, and the kind of cause where the records explain nothing."""
    result = evidence.result
    if result is None:
        return _describe_unseen(evidence)
    if result.layer == RATE:
        return "learning rate", "; the learning rate of this step is another"
    if result.phase == "state before":
        return "initialisation", f"; {result.layer} differs before the step is taken"
    if result.phase == "batch":
        return _compare_batches(*evidence.batches)
    if result.phase == "gradient":
        return "reduction order", "; the batch is equal, and the gradients of its parts add up to others"
    if result.phase == "update":
        return "memory", "; gradients and learning rate are equal: only the update is not, or what was kept for it"
    return "library", "; all results before are equal"


def _describe_unseen(evidence: Evidence) -> tuple[Kind, str]:
    """Judge by the tensors alone."""
    tensors, state = set(evidence.tensors), set(evidence.state)
    if not tensors:
        return "unknown", ""
    kept = {name for name in state if name.rpartition(".")[0] in state}  # by the optimizer
    if len(tensors) == 1 < len(state):
        return "memory", f"; {evidence.tensors[0]} alone is another, as by a flipped bit"
    if kept and tensors <= state - kept:
        return "learning rate", "; what the optimizer keeps is equal and the weights are not, as by another rate"
    return "unknown", "; the batch, the arithmetic or the memory of one of the two was another"


def _compare_batches(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> tuple[Kind, str]:
    """Tell from two batches what was done to one: other labels, pixels, augmentation or images."""
    (images, labels), (other_images, other_labels) = ((each["images"], each["labels"]) for each in (first, second))
    if images.shape != other_images.shape:
        return "image order", "; the batches have other sizes"
    num_labels = int((labels != other_labels).sum())
    changed = (images != other_images).flatten(1)
    apart = changed.any(1)
    num_images, total = int(apart.sum()), len(images)
    if not num_images and not num_labels:
        return "augmentation", "; images and labels are equal, and what they are trained towards is not"
    if not num_images:
        return "data", f"; the images are equal, and {num_labels} of {total} labels are not"
    digests = [sorted(map(compute_tensor_digest, each)) for each in (images, other_images)]
    if digests[0] == digests[1]:
        return "image order", "; the batch has the same images in another order"
    are_few = num_images <= total // 2
    if num_labels or (are_few and changed[apart].float().mean() > MOSTLY):
        return "image order", f"; {num_images} of {total} images are others, with {num_labels} other labels"
    if are_few:
        place = int(torch.nonzero(apart)[0])
        values = f"{int(changed.sum())} pixel values of {num_images} of {total} images"
        return "data", f"; {values} differ, first of image {place} of the batch"
    return "augmentation", f"; the labels are equal, and {num_images} of {total} images are augmented in another way"
