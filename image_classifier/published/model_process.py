"""Load an ONNX file in a process of its own, which `predictor` starts: a small one may ask for any amount of memory.

     python -m image_classifier.published.model_process < FILE

ends well if the file can be loaded, and answers for an image, within the limits.
"""

from __future__ import annotations

import sys

import numpy as np

from image_classifier.confinement import MEMORY_BYTES, Confinement
from image_classifier.errors import ModelError
from image_classifier.published.session import build_options, get_image_size
from image_classifier.text import one_line


def main() -> None:
    """Load and compute what stdin holds."""
    import onnxruntime

    content = sys.stdin.buffer.read()
    options = build_options(onnxruntime, 1)
    options.enable_cpu_mem_arena = False  # which takes more than it needs
    with Confinement(MEMORY_BYTES + 4 * len(content)):
        try:
            session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
            side = get_image_size(session)
            if side is not None:  # else it is none of ours, which its user says
                session.run(None, {session.get_inputs()[0].name: np.zeros((1, side, side, 3), np.uint8)})
        except Exception as error:  # of types that the runtime alone knows
            if "alloc" in str(error):
                raise MemoryError from error
            raise ModelError(
                f"cannot be loaded by ONNX Runtime {onnxruntime.__version__}: {one_line(error)}"
            ) from error


if __name__ == "__main__":
    main()
