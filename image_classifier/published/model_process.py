"""Tests an untrusted ONNX file in a separate process with a memory limit, which `predictor` starts.

     python -m image_classifier.published.model_process < FILE

succeeds if the model can be loaded and computes one image within the limits.
"""

from __future__ import annotations

import sys

import numpy as np

from image_classifier.confinement import MEMORY_BYTES, Confinement
from image_classifier.errors import ModelError
from image_classifier.published.session import build_options, get_image_size
from image_classifier.text import one_line


def main() -> None:
    """Load the model on stdin and compute one image."""
    import onnxruntime

    content = sys.stdin.buffer.read()
    options = build_options(onnxruntime, 1)
    options.enable_cpu_mem_arena = False  # the arena reserves more than it needs
    with Confinement(MEMORY_BYTES + 4 * len(content)):
        try:
            session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
            side = get_image_size(session)
            if side is not None:  # otherwise the caller reports that it is not a model of this package
                session.run(None, {session.get_inputs()[0].name: np.zeros((1, side, side, 3), np.uint8)})
        except Exception as error:  # ONNX Runtime's own types
            if "alloc" in str(error):
                raise MemoryError from error
            raise ModelError(
                f"cannot be loaded by ONNX Runtime {onnxruntime.__version__}: {one_line(error)}"
            ) from error


if __name__ == "__main__":
    main()
