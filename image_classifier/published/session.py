"""Common settings of ONNX Runtime sessions."""

from __future__ import annotations

from typing import Any

from image_classifier.image_sizes import ImageSize, is_image_size


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
