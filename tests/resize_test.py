"""Frames are resized like CLIP's preprocessing: exactly for centre crops, closely elsewhere."""

import sys

import cv2
import numpy as np
import pytest
from PIL import Image

from stoa_jax.data import resize


def photograph(height, width, seed=0):
    """Return an image with the spectrum of photographs: noise at every scale, edges, and grain."""
    rng = np.random.default_rng(seed)
    picture = np.zeros((height, width, 3), np.float32)
    for scale in (4, 8, 16, 32, 64):
        coarse = rng.normal(0, scale / 2, (height // scale + 2, width // scale + 2, 3))
        picture += cv2.resize(coarse.astype(np.float32), (width, height))
    cv2.rectangle(picture, (width // 4, height // 4), (width // 2, height // 2), (90, 60, 30), -1)
    picture += rng.normal(0, 1.5, picture.shape)
    return np.clip(picture + 120, 0, 255).astype(np.uint8)


def by_clip(frame, size):
    """Resize the short side, then crop, as CLIPImageProcessor does."""
    height, width = frame.shape[:2]
    short, long = sorted((height, width))
    to = (size, int(size * long / short)) if width <= height else (int(size * long / short), size)
    resized = np.asarray(Image.fromarray(frame).resize(to, Image.Resampling.BICUBIC))
    top, left = round((to[1] - size) / 2), round((to[0] - size) / 2)
    return resized[top : top + size, left : left + size]


@pytest.mark.parametrize("shape", [(256, 455), (455, 256), (240, 321), (64, 64), (36, 200)])
@pytest.mark.parametrize("size", [32, 48, 112, 224, 300])
def test_centre_crops_are_clips(shape, size):
    frame = photograph(*shape)
    difference = np.abs(resize.resize_and_crop(frame, size).astype(int) - by_clip(frame, size))
    assert difference.max() <= 1  # where rounding differs,
    assert (difference > 0).mean() < 2e-3  # which is rare


def test_the_crop_is_where_the_pixels_are_from():
    ramp = np.tile(np.arange(250, dtype=np.uint8)[None, :, None], (120, 1, 3))
    left, top, width, height = resize.center_crop(120, 250, 60)
    assert (top, height) == (0, 120)
    seen = resize.resize_and_crop(ramp, 60)[30, :, 0]
    centres = left + (np.arange(60) + 0.5) * width / 60 - 0.5
    np.testing.assert_allclose(seen, centres, atol=0.75)


@pytest.mark.parametrize("size", [310, 256, 250, 224, 213, 190, 160, 128, 112])
def test_resampling_is_pils_within_the_tolerance(size):
    frame = photograph(256, 256, size)
    exact = Image.fromarray(frame).resize((size, size), Image.Resampling.BICUBIC)
    difference = np.abs(resize.resample(frame, size, size).astype(int) - np.asarray(exact))
    assert difference.mean() < resize.TOLERANCE
    assert np.percentile(difference, 99) <= 5


@pytest.mark.parametrize(("shape", "size"), [((256, 455), 224), ((455, 256), 112), ((64, 81), 48)])
def test_training_crops_the_middle_in_whole_pixels(shape, size):
    frame = photograph(*shape)
    left, top, width, height = resize.center_window(*shape, size)
    assert left >= 0 and top >= 0 and left + width <= shape[1] and top + height <= shape[0]
    exact = resize.center_crop(*shape, size)
    assert np.abs(np.subtract((left, top, width, height), exact)).max() <= 1
    part = frame[top : top + height, left : left + width]
    out = np.zeros((size, size, 3), np.uint8)
    assert resize.resample(part, size, size, out) is out
    np.testing.assert_array_equal(out, resize.resample(part, size, size))
    by_pil = Image.fromarray(part).resize((size, size), Image.Resampling.BICUBIC)
    assert np.abs(out.astype(int) - np.asarray(by_pil)).mean() < resize.TOLERANCE


def test_resampling_reduces_each_side_by_itself():
    frame = photograph(200, 120)
    exact = Image.fromarray(frame).resize((110, 100), Image.Resampling.BICUBIC)
    difference = np.abs(resize.resample(frame, 100, 110).astype(int) - np.asarray(exact))
    assert difference.mean() < resize.TOLERANCE


def test_strong_reductions_do_not_alias():
    stripes = np.zeros((256, 256, 3), np.uint8)
    stripes[:, ::2] = 255
    for size in (40, 100, 128):
        assert np.ptp(resize.resample(stripes, size, size)[:, 8:-8].astype(int)) <= 40


def test_it_needs_no_tensorflow():
    import subprocess

    code = "import stoa_jax.data.resize, sys; print([m for m in sys.modules if 'tensorflow' in m])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"
