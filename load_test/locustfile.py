"""What callers of a server do, each kind with its share: image files, several at once, pixels, /v2, and wrong input.

LOAD_TEST_KEY in the environment is the key, where the server wants one. Answers are checked, not only their status.
"""

from __future__ import annotations

import io
import json
import os
import random
from typing import Any

import numpy as np
from locust import FastHttpUser, constant, task
from PIL import Image

NUM_IMAGES = 64
SEVERAL = 8
KEY = os.environ.get("LOAD_TEST_KEY", "")


class Caller(FastHttpUser):
    """A client that sends its next request when it has the answer to the last one."""

    wait_time = constant(0)

    def on_start(self) -> None:
        """Ask which images the model takes, and draw some."""
        self.headers = {"Authorization": f"Bearer {KEY}"} if KEY else {}
        with self.client.get("/model", headers=self.headers, catch_response=True) as answer:
            if answer.status_code != 200:
                answer.failure(f"status {answer.status_code}")
                self.environment.runner.quit()
                return
            facts = answer.json()
        self.classes, self.model = set(facts["classes"]), facts["name"]
        side = facts["image_size"]
        shape = (NUM_IMAGES, side, side, 3)
        pixels = np.random.default_rng(random.getrandbits(32)).integers(0, 256, shape, np.uint8)
        self.pixels = [image.tobytes() for image in pixels]
        self.files = [encode(image) for image in pixels]
        self.tensor = {"name": "images", "datatype": "UINT8", "shape": [1, side, side, 3]}

    def send(self, name: str, path: str, num_images: int = 1, **options: Any) -> None:
        """Send images, and check that each has a class of the model."""
        headers = self.headers | options.pop("headers", {})
        with self.client.post(path, name=name, headers=headers, catch_response=True, **options) as answer:
            if answer.status_code != 200:
                answer.failure(f"status {answer.status_code}")
                return
            labels = [each["class"] for each in answer.json()["predictions"]]
            if len(labels) != num_images or not self.classes.issuperset(labels):
                answer.failure(f"{len(labels)} labels for {num_images} images, or of no class of the model")

    @task(6)
    def send_pixels(self) -> None:
        """Send an image as pixels."""
        body = random.choice(self.pixels)
        self.send("pixels", "/predict", data=body, headers={"Content-Type": "application/octet-stream"})

    @task(4)
    def send_file(self) -> None:
        """Send an image file."""
        self.send("file", "/predict", data=random.choice(self.files), headers={"Content-Type": "image/png"})

    @task(1)
    def send_several(self) -> None:
        """Send several image files as a form."""
        files = [("image", (f"{number}.png", file)) for number, file in enumerate(self.files[:SEVERAL])]
        body: Any
        body, content_type = build_form(files)
        self.send("several", "/predict", SEVERAL, data=body, headers={"Content-Type": content_type})

    @task(2)
    def send_tensor(self) -> None:
        """Send a binary tensor in the Open Inference Protocol."""
        pixels = random.choice(self.pixels)
        tensor = {**self.tensor, "parameters": {"binary_data_size": len(pixels)}}
        head = json.dumps({"inputs": [tensor]}).encode()
        body: Any = head + pixels  # Locust's types know texts alone
        headers = {"Content-Type": "application/octet-stream", "Inference-Header-Content-Length": str(len(head))}
        path = f"/v2/models/{self.model}/infer"
        with self.client.post(
            path, name="tensor", data=body, headers=self.headers | headers, catch_response=True
        ) as answer:
            if answer.status_code != 200:
                answer.failure(f"status {answer.status_code}")
            elif len(answer.json()["outputs"][0]["data"]) != len(self.classes):
                answer.failure("not a probability for each class")

    @task(1)
    def send_wrong(self) -> None:
        """Send half an image file, which the server has to refuse with the right status."""
        body: Any = random.choice(self.files)
        with self.client.post(
            "/predict",
            name="wrong file",
            data=body[: len(body) // 2],
            headers=self.headers | {"Content-Type": "image/png"},
            catch_response=True,
        ) as answer:
            expect(answer, 422)

    @task(1)
    def send_stranger(self) -> None:
        """Send a wrong key: refused where the server wants one, and of no matter elsewhere."""
        headers = {"Authorization": "Bearer nobody's"}
        with self.client.get("/model", name="wrong key", headers=headers, catch_response=True) as answer:
            expect(answer, 401 if KEY else 200)


def expect(answer: Any, status: int) -> None:
    """Count an answer as a success where it has the status that it should have, and only then."""
    if answer.status_code == status:
        answer.success()
    else:
        answer.failure(f"status {answer.status_code}, not {status}")


def encode(pixels: Any) -> bytes:
    """Encode pixels, uint8 [S, S, 3], as PNG."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def build_form(files: list[tuple[str, tuple[str, bytes]]]) -> tuple[bytes, str]:
    """Build a form with PNG files, and its media type."""
    boundary = "part"
    parts = [
        f'--{boundary}\r\nContent-Disposition: form-data; name="{field}"; filename="{name}"\r\n'
        "Content-Type: image/png\r\n\r\n".encode() + content + b"\r\n"
        for field, (name, content) in files
    ]
    return b"".join(parts) + f"--{boundary}--\r\n".encode(), f"multipart/form-data; boundary={boundary}"
