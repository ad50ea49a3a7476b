"""A published model where there is no torch: in ONNX Runtime alone, and in the installed package."""

from __future__ import annotations

import json
from pathlib import Path

from tests.conftest import find_dependencies, install_wheel, link_environment, run_program

ALONE = """
import sys
import numpy as np
import onnxruntime

session = onnxruntime.InferenceSession(sys.argv[1])
(probabilities,) = session.run(None, {"images": np.zeros((3, 32, 32, 3), np.uint8)})
print(probabilities.shape, np.allclose(probabilities.sum(axis=1), 1), session.get_modelmeta().producer_name)
"""


def test_the_file_needs_onnx_runtime_alone(published_run: Path, tmp_path: Path) -> None:
    link_environment(tmp_path / ".venv", find_dependencies("onnxruntime"))
    assert not list((tmp_path / ".venv").rglob("torch"))
    output = run_program(tmp_path / ".venv/bin/python", "-c", ALONE, published_run / "model.onnx", cwd=tmp_path)
    assert output == "(3, 10) True image_classifier\n"


def test_the_commands_need_no_torch(published_run: Path, distributions: dict[str, Path], tmp_path: Path) -> None:
    names = find_dependencies("image-classifier") - {"image-classifier", "torch", "torchvision"}
    link_environment(tmp_path / ".venv", names | find_dependencies("onnxruntime"))
    install_wheel(tmp_path / ".venv", distributions["wheel"])
    command = tmp_path / ".venv/bin/image_classifier"
    run_program(command, "evaluate", published_run, "--output", tmp_path / "evaluation.json", cwd=tmp_path)
    evaluation = json.loads((tmp_path / "evaluation.json").read_text())
    run = json.loads((published_run.parent / "evaluation.json").read_text())
    assert evaluation["accuracy"] == run["accuracy_single_view"]
    output = run_program(command, "registry", "check", published_run, cwd=tmp_path)
    assert output.startswith("INTACT\n")
