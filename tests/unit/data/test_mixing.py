"""Mixup and cutmix: what is drawn, what is mixed, and what the targets say of it."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from image_classifier.data.mixing import build_targets, cut_images, draw_parts, find_partners, mix_images
from image_classifier.randomness import draw_bits

IMAGES = draw_bits(0, 0, 0, np.arange(57_600)).view(np.uint8).reshape(200, 3, 24, 32)
NUMBERS = np.arange(200)
PARTNERS = find_partners(200, 8)


@pytest.mark.parametrize("alpha", [0.1, 0.2, 0.5, 1.0, 2.0, 8.0, 100.0])
def test_shares_have_the_distribution_that_was_asked_for(alpha: float) -> None:
    shares = draw_parts(draw_bits(1, 2, 3, np.arange(200_000)), alpha) / 256
    assert shares.mean() == pytest.approx(0.5, abs=0.005)
    assert shares.var() == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.02)  # of Beta(alpha, alpha)
    expected = np.sort(np.random.default_rng(0).beta(alpha, alpha, 200_000))
    assert np.abs(np.sort(shares) - expected)[1000:-1000].max() < 0.02


def test_the_ends_of_the_bits_are_the_ends_of_the_shares() -> None:
    bits = np.array([0, 2**63 - 1, 2**63, 2**64 - 1], dtype=np.uint64)
    assert draw_parts(bits, 1.0).tolist() == [0, 128, 128, 256]
    assert draw_parts(bits // np.uint64(3) * np.uint64(2), 1e-9).tolist() == [0, 0, 0, 256]


@given(st.integers(0, 50), st.integers(1, 20))
def test_each_image_of_a_batch_is_the_partner_of_one_other(num_images: int, batch_size: int) -> None:
    partners = find_partners(num_images, batch_size)
    for start in range(0, num_images, batch_size):
        batch = range(start, min(start + batch_size, num_images))
        assert sorted(partners[batch].tolist()) == list(batch)
        assert len(batch) == 1 or all(partners[place] != place for place in batch)


def test_a_mixture_has_the_share_of_each_image() -> None:
    mixed, shares = mix_images(IMAGES, PARTNERS, NUMBERS, 3, 4, 1.0)
    weights = shares[:, None, None, None].astype(np.float64)
    expected = weights * IMAGES + (1 - weights) * IMAGES[PARTNERS]
    assert mixed.dtype == np.uint8 and np.abs(mixed - expected).max() <= 0.5
    assert len(set(shares.tolist())) > 100


def test_a_rectangle_has_the_share_that_is_left_to_an_image() -> None:
    mixed, shares = cut_images(IMAGES, PARTNERS, NUMBERS, 3, 4, 1.0)
    taken = (mixed == IMAGES[PARTNERS]).all(axis=1)
    assert ((mixed == IMAGES).all(axis=1) | taken).all()
    for part, share in zip(taken, shares, strict=True):
        rows, columns = np.flatnonzero(part.any(axis=1)), np.flatnonzero(part.any(axis=0))
        if share == 1:
            continue
        assert part[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].mean() > 0.99  # pixels may be equal by chance
        assert len(rows) * len(columns) / part.size == pytest.approx(1 - share, abs=0.01)
    assert 0.25 < 1 - shares.mean() < 0.35  # 0.32, and less for sides in whole pixels


def test_what_an_image_is_mixed_with_depends_on_its_number_and_epoch() -> None:
    for mix in (mix_images, cut_images):
        _, shares = mix(IMAGES, PARTNERS, NUMBERS, 3, 4, 1.0)
        _, others = mix(IMAGES[::-1], PARTNERS, NUMBERS[::-1], 3, 4, 1.0)
        assert np.array_equal(shares, others[::-1])
        assert not np.array_equal(shares, mix(IMAGES, PARTNERS, NUMBERS, 3, 5, 1.0)[1])
        assert not np.array_equal(shares, mix(IMAGES, PARTNERS, NUMBERS, 4, 4, 1.0)[1])


def test_targets_are_smoothed_and_weighted() -> None:
    targets = build_targets(4, 0.2, np.array([1.0, 0.5, 2.0, 0.0]))
    assert targets.dtype == np.float32
    assert np.allclose(targets[1], [0.025, 0.425, 0.025, 0.025]) and np.allclose(targets.sum(axis=1), [1, 0.5, 2, 0])


def test_mixtures_are_those_of_every_processor() -> None:
    digest = hashlib.sha256()
    for mix in (mix_images, cut_images):
        for alpha in (0.2, 1.0, 7.3):
            for each in mix(IMAGES, PARTNERS, NUMBERS, 5, 6, alpha):
                digest.update(each.tobytes())
    assert digest.hexdigest() == "5c10164d3e9a4f0a15a5318179eed906ae162f1af599523049cd1f912955e710"
