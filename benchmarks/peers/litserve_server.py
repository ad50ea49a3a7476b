"""LitServe: JSON with the pixels in base64, batches of 32 without a wait, ONNX Runtime."""

from __future__ import annotations

import base64
import json
import os
from typing import Any

import litserve
import numpy as np
import onnxruntime


class Classifier(litserve.LitAPI):  # type: ignore[misc]  # not installed here
    """One model, asked in batches."""

    def setup(self, device: str) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = int(os.environ["PEER_THREADS"])
        self.session = onnxruntime.InferenceSession(os.environ["PEER_MODEL"], options)
        metadata = self.session.get_modelmeta().custom_metadata_map
        self.classes = json.loads(metadata["image_classifier.classes"])

    def decode_request(self, request: dict[str, str]) -> Any:
        return np.frombuffer(base64.b64decode(request["image"]), np.uint8).reshape(32, 32, 3)

    def batch(self, inputs: list[Any]) -> Any:
        return np.stack(inputs)

    def predict(self, batch: Any) -> Any:
        images = batch if batch.ndim == 4 else batch[None]
        return self.session.run(["probabilities"], {"images": images})[0]

    def unbatch(self, output: Any) -> Any:
        return list(output)

    def encode_response(self, output: Any) -> dict[str, Any]:
        best = int(output.argmax())
        return {"class": self.classes[best], "probability": float(output.ravel()[best])}


if __name__ == "__main__":
    api = Classifier(max_batch_size=32, batch_timeout=0.0)
    server = litserve.LitServer(api, accelerator="cpu", workers_per_device=1)
    server.run(host="127.0.0.1", port=int(os.environ["PEER_PORT"]), generate_client_file=False, log_level="warning")
