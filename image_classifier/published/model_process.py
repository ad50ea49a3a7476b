"""Load an ONNX file in a process of its own, which `predictor` starts: a small one may ask for any amount of memory.

     python -m image_classifier.published.model_process < FILE

ends well if the file can be loaded, and answers for an image, within the limits.
"""

from __future__ import annotations

import sys

import numpy as np

from image_classifier.confinement import MEMORY_BYTES, Confinement
from image_classifier.errors import ModelError
from image_classifier.imaging import SIDE
from image_classifier.published.folder import one_line
from image_classifier.published.session import build_options


def main() -> None:
    """Load and compute what stdin holds."""
    import onnxruntime

    content = sys.stdin.buffer.read()
    options = build_options(onnxruntime, 1)
    options.enable_cpu_mem_arena = False  # which takes more than it needs
    with Confinement(MEMORY_BYTES + 4 * len(content)):
        try:
            session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
            inputs = session.get_inputs()
            if len(inputs) == 1 and inputs[0].type == "tensor(uint8)":  # else it is none of ours, which its user says
                session.run(None, {inputs[0].name: np.zeros((1, SIDE, SIDE, 3), np.uint8)})
        except Exception as error:  # of types that the runtime alone knows
            if "alloc" in str(error):
                raise MemoryError from error
            raise ModelError(
                f"cannot be loaded by ONNX Runtime {onnxruntime.__version__}: {one_line(error)}"
            ) from error


if __name__ == "__main__":
    main()
