"""The files of deploy/kubernetes as Kubernetes gets them."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.conftest import PROJECT, run_program

FOLDER = PROJECT / "deploy" / "kubernetes"


Document = dict[str, Any]


@cache
def render_text(target: str) -> str:
    """Render a target; a component on the base."""
    kubectl = shutil.which("kubectl")
    if kubectl is None:  # no package index has one that is new enough, so that CI cannot install it
        pytest.skip("the program kubectl is not installed")
    if not target.startswith("components/"):
        return run_program(kubectl, "kustomize", FOLDER / target, cwd=PROJECT)
    with tempfile.TemporaryDirectory() as name:
        folder = shutil.copytree(FOLDER, Path(name) / "kubernetes") / "rendered"
        folder.mkdir()
        text = {"namespace": "image-classifier", "resources": ["../base"], "components": [f"../{target}"]}
        (folder / "kustomization.yaml").write_text(yaml.safe_dump(text))
        return run_program(kubectl, "kustomize", folder, cwd=PROJECT)


def render(target: str) -> list[Document]:
    return [document for document in yaml.safe_load_all(render_text(target)) if document]


def find(target: str, kind: str) -> Document:
    """Find the one document of a kind."""
    (document,) = (each for each in render(target) if each["kind"] == kind)
    return document


def list_pods(target: str) -> Iterator[Document]:
    """List the specs of pods; of a TrainJob with what its runtime takes from it."""
    for document in render(target):
        spec = document.get("spec", {})
        match document["kind"]:
            case "Deployment" | "Job":
                yield spec["template"]["spec"]
            case "InferenceService":
                yield spec["predictor"]
            case "TrainJob":
                (patch,) = spec["runtimePatches"]
                (job,) = patch["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]
                pod = job["template"]["spec"]["template"]["spec"]
                trainer = spec["trainer"]
                (container,) = pod["containers"]
                container |= {name: trainer[name] for name in ("image", "command", "env")}
                yield {**pod, "containers": [container | {"resources": trainer["resourcesPerNode"]}]}


def list_containers(pod: Mapping[str, Any]) -> list[Document]:
    return [*pod.get("initContainers", ()), *pod["containers"]]


def read_options(target: str, container: Mapping[str, Any]) -> dict[str, str]:
    """Read the variables that a container gets, those of ConfigMaps too; those of the node as 1."""
    maps = {each["metadata"]["name"]: each["data"] for each in render(target) if each["kind"] == "ConfigMap"}
    options: dict[str, str] = {}
    for source in container.get("envFrom", ()):
        options |= maps[source["configMapRef"]["name"]]
    return options | {each["name"]: each.get("value", "1") for each in container.get("env", ())}
