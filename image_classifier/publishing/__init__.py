"""Publishing: turns a finished run into one ONNX file with a parity proof, a model card and a signature."""
