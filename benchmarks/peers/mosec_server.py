"""mosec: the bare pixels, batches of up to 64 with a wait of 2 ms, ONNX Runtime."""

from __future__ import annotations

import json
import os
from typing import Any

import mosec
import numpy as np
import onnxruntime


class Classifier(mosec.Worker):  # type: ignore[misc]  # not installed here
    """One model, asked in batches."""

    def __init__(self) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = int(os.environ["PEER_THREADS"])
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self.session = onnxruntime.InferenceSession(os.environ["PEER_MODEL"], options)
        metadata = self.session.get_modelmeta().custom_metadata_map
        self.classes = json.loads(metadata["image_classifier.classes"])

    def deserialize(self, data: bytes) -> Any:
        return np.frombuffer(data, np.uint8).reshape(32, 32, 3)

    def forward(self, data: list[Any]) -> list[dict[str, Any]]:
        (shares,) = self.session.run(["probabilities"], {"images": np.stack(data)})
        return [{"class": self.classes[int(row.argmax())], "probability": float(row.max())} for row in shares]


if __name__ == "__main__":
    server = mosec.Server()
    server.append_worker(Classifier, num=1, max_batch_size=64, max_wait_time=2)
    server.run()
