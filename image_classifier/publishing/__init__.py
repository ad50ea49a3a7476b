"""Publishing: a finished run becomes one ONNX file that is proved to answer as the run does, described and signed."""
