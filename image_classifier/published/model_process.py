"""Tests an untrusted ONNX file in a separate process with a memory limit, which `predictor` starts.

     python -m image_classifier.published.model_process < FILE

succeeds if the model can be loaded and computes one image within the limits.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np

from image_classifier.confinement import MEMORY_BYTES, Confinement
from image_classifier.errors import ModelError
from image_classifier.image_sizes import ImageSize, is_image_size
from image_classifier.text import one_line


def build_options(runtime: Any, num_threads: int) -> Any:
    """Build session options.

    External weights are disabled, because no digest covers them: a model that needs them fails to load.

    Args:
        runtime: the module `onnxruntime`.
        num_threads: threads per batch.
    """
    options = runtime.SessionOptions()
    options.intra_op_num_threads = num_threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 4
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", "/dev/null/none")
    return options


def get_image_size(session: Any) -> ImageSize | None:
    """Return S if the model's only input is uint8 [N, S, S, 3], otherwise None."""
    inputs = session.get_inputs()
    if len(inputs) != 1 or inputs[0].type != "tensor(uint8)" or len(inputs[0].shape) != 4:
        return None
    _, height, width, channels = inputs[0].shape
    return height if is_image_size(height) and (width, channels) == (height, 3) else None


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
