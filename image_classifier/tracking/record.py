"""The record of a run, run.json: written before the first step, and compared when the run is resumed."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from image_classifier.data.snapshot import Snapshot
from image_classifier.errors import RunError
from image_classifier.plugins import PLUGGABLE, describe
from image_classifier.references import describe_place
from image_classifier.settings import RunSettings, TrainingSettings, update_recorded_settings
from image_classifier.text import list_classes
from image_classifier.tracking.environment import describe_installation
from image_classifier.tracking.identity import (
    describe_code,
    describe_environment,
    describe_machine,
    find_differing_keys,
)
from image_classifier.tracking.layout import FORMAT_VERSION

IDENTITY = ("settings", "data", "code", "plugins", "environment", "machine")
"""Parts of a record that decide about a run's bits."""


def build_record(
    settings: RunSettings,
    training: TrainingSettings,
    data: dict[str, Any],
    command: Sequence[str],
    pretrained: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Build run.json: the run's identity, and for people where and how it was started.

    Args:
        training: resolved.
        data: name, digest, classes and number of images of the snapshot, its version in the database, and what was
            found in it.
        pretrained: path, digest and classes of the weights to start from, and what the run has from them.
    """
    found = {kind: describe(kind, getattr(training, kind)) for kind in PLUGGABLE}
    plugins = {kind: plugin for kind, plugin in found.items() if plugin is not None}
    return {
        "format_version": FORMAT_VERSION,
        "experiment_name": settings.experiment_name,
        "run_name": settings.run_name,
        "started_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": list(command),
        "recipe": settings.recipe,
        "recipe_reason": settings.recipe_reason,
        "settings": describe_settings(training),
        "execution": {
            "num_threads": settings.num_threads,
            "num_workers": settings.num_workers,
            "checkpoint_every": settings.checkpoint_every,
            "keep_checkpoints": settings.keep_checkpoints,
            "dataset_folder": describe_place(settings.dataset_folder),
            "fit": settings.fit,
            "skip_bad": settings.skip_bad,
            "database": settings.database,
            "db_config": settings.db_config and str(settings.db_config),
            "db_pass_file": settings.db_pass_file and str(settings.db_pass_file),
            "experiments_folder": str(settings.experiments_folder),
            "pretrained_model": settings.pretrained_model and str(settings.pretrained_model),
            "tracking_uri": settings.tracking_uri,
            "mirror": settings.mirror and describe_place(settings.mirror),
            "mirror_checkpoints": settings.mirror_checkpoints,
        },
        "data": data,
        "pretrained": pretrained,
        "code": describe_code(),
        "plugins": {kind: plugin.to_json() for kind, plugin in plugins.items()},
        "environment": describe_environment([each.distribution for each in plugins.values() if each.distribution]),
        "machine": describe_machine(training),
    }


def build_environment(record: dict[str, Any]) -> dict[str, Any]:
    """Build environment.json: what the environment of the record is made of."""
    plugins = (record.get("plugins") or {}).values()
    return describe_installation(record["code"], [each["distribution"] for each in plugins if each["distribution"]])


def describe_settings(training: TrainingSettings) -> dict[str, Any]:
    """Describe training settings as JSON has them."""
    values = dataclasses.asdict(training)
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def describe_data(snapshot: Snapshot, num_train: int, num_validation: int) -> dict[str, Any]:
    """Describe for the record what is trained, validated and tested on."""
    return {
        "name": snapshot.name,
        "digest": snapshot.digest,
        "digest_format": snapshot.digest_format,
        "database": snapshot.database,
        "classes": list(snapshot.classes),
        "num_train": num_train,
        "num_validation": num_validation,
        "num_test": snapshot.num_test,
        "findings": snapshot.findings and snapshot.findings.to_json(),
        "notes": snapshot.describe_notes(),
    }


def describe_origin(record: dict[str, Any]) -> dict[str, str]:
    """Describe for model.pth which run its weights come from."""
    return {
        "experiment_name": record["experiment_name"],
        "run_name": record["run_name"],
        "data_digest": record["data"]["digest"],
        "code_digest": record["code"]["digest"],
        "instruction_set": record["settings"]["instruction_set"],
    }


def describe_identity(record: dict[str, Any]) -> dict[str, str]:
    """Describe each part of a run's identity so that processes can compare it."""
    return {part: str(record[part].get("digest") or record[part]) for part in IDENTITY}


def find_identity_changes(recorded: dict[str, Any], present: dict[str, Any]) -> dict[str, str]:
    """Compare two records part by part: what differs in words, by part; a part that is equal is left out.

    The parts are settings, data, pretrained, code, plugins, environment and machine.
    """
    changes = {}
    differing = _list_setting_differences(recorded["settings"], present["settings"])
    if differing:
        changes["settings"] = differing
    for part in ("data", "pretrained", "code"):
        old, new = ((record[part] or {"digest": "none"})["digest"] for record in (recorded, present))
        if old != new:
            changes[part] = f"its digest was {old[:12]}, is {new[:12]}"
    old, new = (
        {kind: f"{each['target']} {each['digest'][:12]}" for kind, each in (record.get("plugins") or {}).items()}
        for record in (recorded, present)
    )
    if old != new:
        changes["plugins"] = _list_differences(old, new)
    for part, details in (("environment", "distributions"), ("machine", "class")):
        if recorded[part]["digest"] != present[part]["digest"]:
            old, new = ({**record[part], **record[part][details]} for record in (recorded, present))
            for description in (old, new):
                for name in ("digest", "lock_digest", details):
                    description.pop(name, None)
            changes[part] = _list_differences(old, new)
    return changes


def _list_setting_differences(old: dict[str, Any], new: dict[str, Any]) -> str:
    return _list_differences(update_recorded_settings(old), new, prefix="--")


def _list_differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> str:
    return ", ".join(
        f"{prefix}{name} was {old.get(name)}, is {new.get(name)}" for name in find_differing_keys(old, new)
    )


def check_settings(recorded: dict[str, Any], training: TrainingSettings, folder: Path) -> None:
    """Check that resolved settings are those of a record.

    Raises:
        RunError: they are not.
    """
    differing = _list_setting_differences(recorded["settings"], describe_settings(training))
    if differing:
        raise RunError(f"{folder} cannot be resumed, because its settings changed: {differing}; start another run")


def describe_start(record: dict[str, Any]) -> list[str]:
    """Describe the weights that a run starts from, a line each: which file, what they say, what is trained of them."""
    pretrained, settings = record["pretrained"], record["settings"]
    if pretrained is None:
        return []
    theirs = ", ".join(f"{name} {settings[name]}" for name in pretrained.get("settings", []))
    lines = [f"starts from {pretrained['path']} (sha256 {pretrained['digest'][:12]})", describe_head(record)]
    lines += [f"the weights say {theirs}"] if theirs else []
    lines += ["the body is frozen: the head alone is trained"] if settings.get("freeze") == "body" else []
    return lines


def describe_head(record: dict[str, Any]) -> str:
    """Describe which rows of the head a run has from the weights that it starts from."""
    classes, pretrained = record["data"]["classes"], record["pretrained"]
    if pretrained.get("classes", classes) == classes:
        return "the head keeps all rows"
    if "kept_classes" not in pretrained:  # before, rows were taken by their place
        return f"the weights were trained on other classes: {list_classes(pretrained['classes'])}"
    kept = pretrained["kept_classes"]
    new = [name for name in classes if name not in kept]
    keeps = f"the head keeps the rows of {list_classes(kept)}" if kept else "the head keeps no row"
    return f"{keeps}; it is new for {list_classes(new)}" if new else f"{keeps}, in the data's order"


BY_ANY_MACHINE = "any x86-64 with AVX2, or any aarch64"
BY_ITS_CLASS = "a machine of the same class"


def describe_checkers(record: dict[str, Any]) -> str:
    """Describe which machines can train a run again to the bit."""
    return BY_ANY_MACHINE if record["settings"].get("instruction_set") == "portable" else BY_ITS_CLASS


ALLOWING_OPTIONS = {
    "code": "allow_code_change",
    "plugins": "allow_code_change",
    "environment": "allow_environment_change",
    "machine": "allow_other_machine",
}
"""The parts of a run's identity that may change when it is resumed, by the option that allows it."""


def check_identity(recorded: dict[str, Any], present: dict[str, Any], settings: RunSettings) -> dict[str, Any]:
    """Check that a run goes on as what it began; return the record, with what was allowed to change noted in it.

    Raises:
        RunError: something of its identity differs that must not, or was not allowed to.
    """
    changes = find_identity_changes(recorded, present)
    for part, difference in changes.items():
        option = ALLOWING_OPTIONS.get(part)
        if option is None or not getattr(settings, option):
            remedy = f"go on with --{option}, which the record will say" if option else "start another run"
            raise RunError(
                f"{settings.run_folder} cannot be resumed, because its {part} changed: {difference}; {remedy}"
            )
    if not changes:
        return recorded
    changed = {part: present[part] for part in changes}
    history = [*recorded.get("changes", []), {"resumed_at": present["started_at"], **changes}]
    return {**recorded, **changed, "changes": history}
