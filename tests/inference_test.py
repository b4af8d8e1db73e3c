import shutil

import clip_files
import numpy as np
import pytest
import released_example as example
from clip_tiny import FOLDER

import stoa_jax
from stoa_jax import weights
from stoa_jax.data.resize import resize_and_crop
from stoa_jax.errors import UserError
from stoa_jax.weights import released
from stoa_jax.weights.files import save_safetensors
from stoa_jax.weights.tables import write_table


@pytest.fixture(scope="module")
def clip():
    return stoa_jax.load(FOLDER)


def _clips(*lengths, size=(20, 28), seed=0):
    rng = np.random.RandomState(seed)
    return [rng.randint(0, 256, (n, *size, 3)).astype(np.uint8) for n in lengths]


def test_vectors_of_unit_length(clip):
    videos = clip.encode_video(_clips(1, 5, 40))
    texts = clip.encode_text(["a dog runs", "two cats on a mat", "?"])
    for x in (videos, texts):
        assert x.shape == (3, 24) and x.dtype == np.float32
        np.testing.assert_allclose(np.linalg.norm(x, axis=-1), 1, atol=1e-5)


def test_a_clip_does_not_depend_on_those_beside_it(clip):
    clips = _clips(3, 3, 3, 3, 3, 3, 3)
    together = clip.encode_video(clips)
    apart = np.concatenate([clip.encode_video([one]) for one in clips])
    np.testing.assert_allclose(together, apart, atol=1e-5)
    np.testing.assert_allclose(clip.encode_video(np.stack(clips)), together, atol=1e-5)


def test_long_clips_are_sampled_evenly(clip):
    (one,) = _clips(1)
    held = np.repeat(one, 50, 0)
    np.testing.assert_allclose(clip.encode_video([held]), clip.encode_video([one]), atol=1e-5)


def test_frames_are_cropped_to_the_middle():
    frame = np.zeros((40, 100, 3), np.uint8)
    frame[:, 30:70] = 200
    assert (resize_and_crop(frame, 40) == 200).all()
    assert resize_and_crop(frame.transpose(1, 0, 2), 20).shape == (20, 20, 3)


@pytest.mark.parametrize(
    "shape, kind", [((2, 8, 8, 3), np.float32), ((8, 8, 3), np.uint8), ((0, 8, 8, 3), np.uint8)]
)
def test_what_is_no_clip(clip, shape, kind):
    with pytest.raises(UserError, match="video 0: the video is"):
        clip.encode_video([np.zeros(shape, kind)])


def test_what_is_no_list_of_texts(clip):
    with pytest.raises(UserError, match="list"):
        clip.encode_text("a dog")
    with pytest.raises(UserError, match="text 1 is a int"):
        clip.encode_text(["a", 3])


def test_no_file(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        stoa_jax.load(tmp_path / "none")


def test_a_whole_stoa(tmp_path):
    c = example.TINY.released()
    import dataclasses
    import json

    path = tmp_path / "stoa.safetensors"
    save_safetensors(
        path, example.parameters(c), {weights.METADATA: json.dumps(dataclasses.asdict(c))}
    )
    model = stoa_jax.load(path)
    assert model.kind == "stoa_jax" and model.network is not None
    # Frames attend to each other here, so each clip has exactly the frames of the training.
    assert model.encode_video(_clips(2, 9)).shape == (2, 64)


def test_it_opens_clip_in_everyones_names(tmp_path, clip):
    tensors, _ = clip_files.openai_tensors()
    scripted = {**tensors, "input_resolution": np.float16(16)}
    clip_files.write_torchscript(tmp_path / "ViT-B-16.pt", scripted)
    save_safetensors(tmp_path / "open_clip_quickgelu.safetensors", tensors, {})
    clips, texts = _clips(2, 5), ["a dog runs", "two cats"]
    for name, kind in (("ViT-B-16.pt", "openai"), ("open_clip_quickgelu.safetensors", "open_clip")):
        model = stoa_jax.load(tmp_path / name)
        assert model.kind == kind
        # OpenAI's files do not state the width of a head: it is 64.
        assert model.config.vision_heads == 1
        assert model.encode_video(clips).shape == model.encode_text(texts).shape == (2, 24)


def test_it_opens_the_authors_checkpoint(tmp_path):
    c = example.TINY.released()
    tensors = write_table(released.TABLE, example.parameters(c))
    save_safetensors(tmp_path / "stoa.safetensors", tensors, {})
    model = stoa_jax.load(tmp_path / "stoa.safetensors")
    assert model.kind == "released"
    videos = model.encode_video(_clips(3))
    np.testing.assert_allclose(np.linalg.norm(videos, axis=-1), 1, atol=1e-5)


def test_own_tokenizer_of_a_directory(tmp_path, clip):
    folder = tmp_path / "clip"
    shutil.copytree(FOLDER, folder)
    (folder / "merges.txt").write_text("not a tokenizer")
    with pytest.raises(UserError):
        stoa_jax.load(folder)
