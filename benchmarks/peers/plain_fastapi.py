"""FastAPI as tutorials write it: a multipart upload, Pillow, torch in eager mode, one image at a time."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fastapi import FastAPI, UploadFile
from PIL import Image

from image_classifier.tracking.checkpoint import load_model

model = load_model(Path(os.environ["PEER_RUN"]) / "model.pth")
model.classifier.eval()
app = FastAPI()


@app.post("/predict")
async def predict(file: UploadFile) -> dict[str, Any]:
    """Classify one uploaded image."""
    image = Image.open(io.BytesIO(await file.read())).convert("RGB").resize((32, 32))
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]
    with torch.no_grad():
        shares = model.classifier(pixels).softmax(dim=1)[0]
    best = int(shares.argmax())
    return {"class": model.classes[best], "probability": float(shares[best])}
