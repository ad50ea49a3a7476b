"""A published model in ONNX Runtime alone; tests/e2e/test_extras.py has the installed package without torch."""

from __future__ import annotations

from pathlib import Path

from tests.conftest import find_dependencies, link_environment, run_program

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
