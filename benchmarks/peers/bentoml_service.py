"""BentoML: adaptive batching of up to 32, the latency bound high enough to refuse nothing, ONNX Runtime."""

from __future__ import annotations

import base64
import json
import os

import bentoml
import numpy as np
import onnxruntime


@bentoml.service(traffic={"timeout": 60}, metrics={"enabled": False})
class Classifier:
    """One model, asked in batches."""

    def __init__(self) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = int(os.environ["PEER_THREADS"])
        self.session = onnxruntime.InferenceSession(os.environ["PEER_MODEL"], options)
        metadata = self.session.get_modelmeta().custom_metadata_map
        self.classes = json.loads(metadata["image_classifier.classes"])

    @bentoml.api(  # type: ignore[untyped-decorator]  # bentoml is not installed here
        batchable=True, max_batch_size=32, max_latency_ms=60_000
    )
    def predict(self, images: list[str]) -> list[str]:
        """Classify images of which the pixels come in base64."""
        pixels = np.stack([np.frombuffer(base64.b64decode(text), np.uint8).reshape(32, 32, 3) for text in images])
        (shares,) = self.session.run(["probabilities"], {"images": pixels})
        return [self.classes[int(row.argmax())] for row in shares]
