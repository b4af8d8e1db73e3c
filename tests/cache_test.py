"""Kept clips give the same batches as clips decoded for each batch."""

import dataclasses

import jax
import numpy as np
import pytest
import toy_source
from jax.sharding import AxisType

from stoa_jax import sharding
from stoa_jax.data import clips, pipeline
from stoa_jax.errors import UserError

SPEC = pipeline.BatchSpec(frames=3, image_size=16, objects=2, text_length=8, crop="center")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    directory = tmp_path_factory.mktemp("data")
    toy_source.build(directory, toy_source.Source({"train": 37, "test": 11}))
    toy_source.build(directory, toy_source.Source({"train": 20}), "webvid/captions")
    toy_source.build(directory, toy_source.Source({"train": 10, "test": 7}, "qa"), "msvd/qa")
    return directory


def mixture(data):
    return [
        (pipeline.open_split(data, "folder/captions", "train"), 2.0),
        (pipeline.open_split(data, "webvid/captions", "train"), 1.0),
    ]


def same(one, two):
    assert one.keys() == two.keys()
    for name in one:
        np.testing.assert_array_equal(np.asarray(one[name]), np.asarray(two[name]), name)


@pytest.mark.parametrize("crop", ["center", "random"])
@pytest.mark.parametrize("flip", [False, True])
def test_batches_from_memory_are_the_same(data, crop, flip):
    spec = dataclasses.replace(SPEC, crop=crop, flip=flip)
    plain = pipeline.Loader(mixture(data), spec, 8, seed=5, cache="off")
    kept = pipeline.Loader(mixture(data), spec, 8, seed=5, cache="memory")
    for step in [0, 1, 2, 3, 20, 1, 0]:  # later steps find their clips in the cache
        same(plain.batch(step), kept.batch(step))


def test_questions_from_memory_are_the_same(data):
    split = pipeline.open_split(data, "msvd/qa", "test")
    spec = dataclasses.replace(SPEC, kind="qa", answers=("red", "blue"))
    plain = list(pipeline.Loader(split, spec, 4, train=False, cache="off"))
    for _ in range(2):
        kept = list(pipeline.Loader(split, spec, 4, train=False, cache="memory"))
        assert len(plain) == len(kept)
        for one, two in zip(plain, kept, strict=True):
            same(one, two)


def test_a_second_loader_of_a_split_decodes_nothing(data, monkeypatch):
    split = pipeline.open_split(data, "folder/captions", "test")
    first = list(pipeline.Loader(split, SPEC, 4, train=False, cache="memory"))

    def fail(*_):
        raise AssertionError("decoded again")

    monkeypatch.setattr(clips, "decode", fail)
    for one, two in zip(first, pipeline.Loader(split, SPEC, 4, train=False), strict=True):
        same(one, two)


def test_all_frames_are_one_array(data):
    split = pipeline.open_split(data, "folder/captions", "test")
    loader = pipeline.Loader(split, SPEC, 4, train=False, cache="memory")
    batches = list(loader)
    kept = clips.kept_clips(split, SPEC, middle=True)
    assert kept.frames.shape == (11, 3, 16, 16, 3)
    valid = np.concatenate([b["pixels"][b["valid"]] for b in batches])
    np.testing.assert_array_equal(kept.frames, valid)
    assert all(kept[i].frames.base is kept.frames for i in range(11))


@pytest.mark.parametrize("shape", [(8, 1, 1), (4, 2, 1), (2, 2, 2), (1, 1, 1)])
@pytest.mark.parametrize("flip", [False, True])
def test_batches_from_the_devices_are_the_same(data, shape, flip):
    devices = jax.devices()[: int(np.prod(shape))]
    mesh = jax.make_mesh(shape, sharding.AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)
    spec = dataclasses.replace(SPEC, flip=flip)
    plain = pipeline.Loader(mixture(data), spec, 8, seed=5, cache="off")
    kept = pipeline.Loader(mixture(data), spec, 8, seed=5, cache="device")
    for step in [0, 1, 9]:
        host = kept.batch(step)
        assert "pixels" not in host
        batch = kept.to_devices(host, mesh)
        same(plain.batch(step), batch)
        assert batch["pixels"].sharding == sharding.batch_sharding(mesh)
    held = kept._device_frames.frames
    per_device = held.addressable_shards[0].data.shape[0]
    assert per_device * shape[0] * shape[1] == held.shape[0] >= 57


def test_wrong_settings_are_named(data):
    split = pipeline.open_split(data, "folder/captions", "train")
    with pytest.raises(UserError, match=r"data.cache is 'ram'; choose one of auto, off, memory"):
        pipeline.Loader(split, SPEC, 4, cache="ram")
    with pytest.raises(UserError, match=r"data.cache=device keeps cropped frames; set data.crop"):
        pipeline.Loader(split, dataclasses.replace(SPEC, crop="random"), 4, cache="device")
    with pytest.raises(UserError, match=r"data.cache=memory .* set data.workers=0"):
        pipeline.Loader(split, SPEC, 4, cache="memory", workers=2)


def test_more_than_the_free_memory_is_refused(data, monkeypatch):
    split = pipeline.open_split(data, "folder/captions", "train")
    monkeypatch.setattr(clips, "_free_bytes", lambda: 1000)
    with pytest.raises(
        UserError, match=r"data.cache=memory: .* need .* GiB, .* set data.cache=off"
    ):
        pipeline.Loader(split, SPEC, 4, cache="memory")
    assert pipeline.Loader(split, SPEC, 4).batch(0)["pixels"].shape == (4, 3, 16, 16, 3)
