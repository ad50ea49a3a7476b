"""The settings that every session of ONNX Runtime has here."""

from __future__ import annotations

from typing import Any


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
