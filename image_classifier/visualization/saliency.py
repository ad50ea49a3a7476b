"""Saliency: on which pixels of an image the score of a class depends, by SmoothGrad."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

NUM_SAMPLES = 64
NOISE = 0.15
"""Standard deviation of the noise, as a part of the range of pixels; Smilkov et al. recommend 10 to 20 %."""
_BRIGHTEST = 99  # percentile that is drawn as 1: single pixels would darken all others


def compute_saliency(
    classifier: nn.Module, image: NDArray[np.uint8], label: int, *, seed: int = 0
) -> NDArray[np.float32]:
    """Compute the saliency of each pixel for a class: the gradient of its logit, averaged over noisy copies.

    SmoothGrad of Smilkov et al., 2017 (arXiv:1706.03825); of the three colours the largest counts. The same arguments
    give the same map.

    Args:
        classifier: on the CPU; maps images [N, 3, S, S] of values from 0 to 255 to logits [N, C]; left in its mode.
        image: uint8 [3, S, S].
        label: number of the class.
        seed: of the noise.

    Returns:
        float32 [S, S], from 0 to 1.
    """
    noise = np.random.default_rng(seed).normal(0, NOISE * 255, (NUM_SAMPLES, *image.shape))
    copies = torch.from_numpy((image + noise).astype(np.float32)).requires_grad_()
    was_training = classifier.training
    classifier.eval()
    try:
        with torch.enable_grad():
            (gradients,) = torch.autograd.grad(classifier(copies)[:, label].sum(), copies)
    finally:
        classifier.train(was_training)
    saliency = gradients.mean(dim=0).abs().amax(dim=0).numpy()
    highest = float(np.percentile(saliency, _BRIGHTEST)) or float(saliency.max()) or 1.0
    return np.clip(saliency / highest, 0, 1).astype(np.float32)
