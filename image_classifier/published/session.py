"""The settings that every session of ONNX Runtime has here."""

from __future__ import annotations

from typing import Any

from image_classifier.image_sizes import ImageSize, is_image_size


def build_options(runtime: Any, num_threads: int) -> Any:
    """Build a session's options.

    Weights outside the ONNX file are not found: nobody has checked those. A model that asks for them fails.

    Args:
        runtime: the module `onnxruntime`.
        num_threads: threads that compute one batch.
    """
    options = runtime.SessionOptions()
    options.intra_op_num_threads = num_threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 4
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", "/dev/null/none")
    return options


def get_image_size(session: Any) -> ImageSize | None:
    """Get the side S in pixels of images uint8 [N, S, S, 3] that a session's model takes; None if it takes others."""
    inputs = session.get_inputs()
    if len(inputs) != 1 or inputs[0].type != "tensor(uint8)" or len(inputs[0].shape) != 4:
        return None
    _, height, width, channels = inputs[0].shape
    return height if is_image_size(height) and (width, channels) == (height, 3) else None
