#!/usr/bin/env python3
"""Plans what the jobs of training.yaml do: writes to GITHUB_OUTPUT which of them run, at which commit, and on what.

Inputs, which are INPUT_<NAME> in the environment, start a training or continue one; the schedule verifies the newest
published run. What another run of the workflow left is traced back to the branch (artifact.py). Standard library only.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from artifact import (
    UNFINISHED,
    Artifact,
    RefusedError,
    check_history,
    download,
    find_artifact,
    find_newest,
    get_tip,
    report,
)

CHECK_INPUTS = Path(__file__).with_name("check_inputs.sh")
FOLDERS = {"cifar_dataset": "cifar10", "sample_dataset": "sample"}


def main() -> int:
    """Write the plan."""
    try:
        scheduled = os.environ["GITHUB_EVENT_NAME"] == "schedule"
        plan = plan_verification() if scheduled else plan_training(os.environ)
    except RefusedError as refusal:
        return report(refusal)
    if plan is None:
        return 2
    with open(os.environ["GITHUB_OUTPUT"], "a", encoding="utf-8") as output:
        output.writelines(f"{name}={value}\n" for name, value in plan.items())
    return 0


def plan_training(inputs: Mapping[str, str]) -> dict[str, str] | None:
    """Plan a training; None if an input is wrong, which `check_inputs.sh` has said.

    Raises:
        RefusedError: what is to be gone on with is not of this branch.
    """
    if not are_good(inputs):
        return None
    head = commit = os.environ["GITHUB_SHA"]
    number, unfinished = "0", None
    if inputs["INPUT_CONTINUATION"]:
        run_id, number, commit = inputs["INPUT_CONTINUATION"].split(":")
        check_history(commit, head, "the commit of the continuation")
        unfinished = find_artifact(run_id, UNFINISHED, os.environ["GITHUB_REF_NAME"], head, finished=False)
        record = read_record(unfinished)
        for name, found, wanted in (
            ("experiment", get(record, "experiment_name"), inputs["INPUT_EXPERIMENT_NAME"]),
            ("run", get(record, "run_name"), inputs["INPUT_RUN_NAME"]),
            ("commit", get(record, "code", "commit"), commit),
        ):
            if found != wanted:
                raise RefusedError(f"the workflow run {run_id} has left the {name} {found}, not {wanted}")
    return {
        "train": "true",
        "verify": inputs["INPUT_VERIFY"],
        "commit": commit,
        **describe_data(inputs),
        "continuation_number": number,
        **describe("unfinished", unfinished),
        **describe("previous", find_newest(os.environ["DEFAULT_BRANCH"])),
    }


def plan_verification() -> dict[str, str] | None:
    """Plan the verification of the newest published run; None if its record is no good.

    Raises:
        RefusedError: it was trained at a commit that is not of this branch.
    """
    branch = os.environ["DEFAULT_BRANCH"]
    published = find_newest(branch)
    if published is None:
        return {"train": "false", "verify": "false"}
    record = read_record(published)
    folder = get(record, "execution", "dataset_folder").removeprefix("/data/")
    inputs = {  # what the artifact says is checked like what a person says
        "INPUT_EXPERIMENT_NAME": get(record, "experiment_name"),
        "INPUT_RUN_NAME": get(record, "run_name"),
        "INPUT_DATASET": FOLDERS.get(folder, folder),
        "INPUT_DATABASE": get(record, "execution", "database"),
        "INPUT_RECIPE": get(record, "recipe"),
        "INPUT_INSTRUCTION_SET": get(record, "settings", "instruction_set"),
        "INPUT_PRETRAINED_MODEL": get(record, "execution", "pretrained_model"),
        "INPUT_VERIFY": "true",
        "INPUT_PUBLISH": "false",
    }
    if not are_good(inputs):
        return None
    commit = get(record, "code", "commit")
    check_history(commit, get_tip(branch), f"the commit of the run that the workflow run {published.run_id} published")
    return {
        "train": "false",
        "verify": "true",
        "commit": commit,
        **describe_data(inputs),
        **describe("published", published),
    }


def are_good(inputs: Mapping[str, str]) -> bool:
    """Say whether inputs are as they have to be."""
    others = {name: value for name, value in os.environ.items() if not name.startswith("INPUT_")}
    own = {name: value.replace("\0", " ") for name, value in inputs.items() if name.startswith("INPUT_")}
    return subprocess.run([CHECK_INPUTS], env=others | own).returncode == 0


def describe_data(inputs: Mapping[str, str]) -> dict[str, str]:
    """Describe what is trained on and begun with."""
    database = inputs["INPUT_DATABASE"]
    return {
        "dataset": f"db:{database}" if database else inputs["INPUT_DATASET"],
        "pretrained_model": inputs["INPUT_PRETRAINED_MODEL"],
    }


def describe(name: str, artifact: Artifact | None) -> dict[str, str]:
    """Describe an artifact by what no other can be taken for; nothing for none."""
    return {f"{name}_id": str(artifact.id), f"{name}_digest": artifact.digest} if artifact else {}


def read_record(artifact: Artifact) -> Any:
    """Read the record of the run in an artifact.

    Raises:
        RefusedError: it holds none.
    """
    with TemporaryDirectory() as temporary:
        folder = Path(temporary) / "run"
        download(artifact.id, artifact.digest, folder)
        try:
            return json.loads((folder / "run.json").read_bytes())
        except (OSError, ValueError, RecursionError) as error:
            raise RefusedError(f"the workflow run {artifact.run_id} has left no record: {error!a}") from error


def get(record: Any, *keys: str) -> str:
    """Get a text in a record; where it is missing, or no text, nothing."""
    for key in keys:
        record = record.get(key) if isinstance(record, dict) else None
    return record if isinstance(record, str) else ""


if __name__ == "__main__":
    sys.exit(main())
