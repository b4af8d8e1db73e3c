"""Results do not depend on the batch, few shapes are compiled, and bad input is reported."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
import saved_models
from clip_tiny import FOLDER
from videos import write as write_file

import stoa_jax
from stoa_jax import cli
from stoa_jax.convert import convert
from stoa_jax.models.config import ModelConfig

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
ANSWERS = ["red", "blue", "two"]
TEXTS = ["a dog runs", "two men wrestle", "a pan on a stove", "a dog runs", "it rains"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    config = dataclasses.replace(ModelConfig.tiny(), num_answers=3, text_depth=1, fusion_depth=1)
    return saved_models.write_random(
        tmp_path_factory.mktemp("models") / "tiny", config, answers=ANSWERS
    )


@pytest.fixture(scope="module")
def model(folder):
    return stoa_jax.load(folder)


def write_video(path):
    write_file(path)
    return path


def videos(count, frames=4, size=(60, 80), seed=0):
    rng = np.random.RandomState(seed)
    return [rng.randint(0, 256, (frames, *size, 3)).astype(np.uint8) for _ in range(count)]


def boxed(count, seed=0):
    out = []
    for i, video in enumerate(videos(count, seed=seed)):
        rng = np.random.RandomState(i)
        low = rng.uniform(0, 0.5, (4, 3, 2))
        boxes = np.concatenate([low, low + 0.4], -1)
        found = stoa_jax.Detections(boxes, rng.randint(0, 2, (4, 3)), rng.rand(4, 3), ("a", "b"))
        out.append(stoa_jax.Clip(video, detections=found))
    return out


def test_results_do_not_depend_on_the_batch(model):
    clips = boxed(5)
    order = [3, 0, 4, 1, 2, 0]  # another order, with one of them twice
    mixed = [clips[i] for i in order]
    for call in (
        lambda v, b: model.encode_video(v, batch_size=b),
        lambda v, b: model.match(v, TEXTS, batch_size=b),
        lambda v, b: np.array([a[0].probability for a in _answers(model, v, b)]),
    ):
        alone = np.concatenate([call([clip], 1) for clip in clips])
        np.testing.assert_allclose(call(clips, 16), alone, atol=1e-5)
        np.testing.assert_allclose(call(mixed, 4), alone[order], atol=1e-5)
    alone = np.concatenate([model.encode_text([text]) for text in TEXTS])
    np.testing.assert_allclose(model.encode_text(TEXTS, batch_size=2), alone, atol=1e-5)
    captions = [model.caption([clip], beam=2, max_pieces=4)[0] for clip in clips]
    assert model.caption(clips, beam=2, max_pieces=4, batch_size=3) == captions


def _answers(model, clips, batch_size):
    return model.answer(clips, ["what color is it"] * len(clips), batch_size=batch_size)


def test_bfloat16_is_near(folder, model):
    half = stoa_jax.load(folder, dtype="bfloat16")
    assert half.fingerprint == model.fingerprint
    cosine = (half.encode_video(videos(3)) * model.encode_video(videos(3))).sum(1)
    assert (cosine > 0.99).all()


def test_few_shapes_are_compiled(tmp_path):
    config = dataclasses.replace(ModelConfig.tiny(), vision_depth=2, text_width=48, vocab_size=1024)
    own = stoa_jax.load(saved_models.write_random(tmp_path / "own", config))
    seen = []

    def count(event, duration, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            seen.append(event)

    jax.monitoring.register_event_duration_secs_listener(count)
    for n in range(1, 10):
        own.encode_video(videos(n, frames=1 + n % 6), batch_size=4)
        own.encode_text(TEXTS[:1] * n, batch_size=4)
    # Frames of up to 4 videos of 4 frames: 1, 2, 4, 8, 16; texts: 1, 2, 4.
    assert 0 < len(seen) <= 8


@pytest.mark.parametrize(
    "video, words",
    [
        ("/nowhere/none.mp4", "video 0: /nowhere/none.mp4: No such file"),
        (b"", "0 bytes"),
        (b"no video", "not a video"),
        ([], "empty list"),
        (np.zeros((0, 8, 8, 3), np.uint8), "at least one frame"),
        (np.zeros((2, 8, 8, 3), np.float32), r"float32 \[2, 8, 8, 3\]"),
        (3, "is a int"),
    ],
    ids=str,
)
def test_what_is_no_video(model, video, words):
    with pytest.raises(stoa_jax.UserError, match=words):
        model.encode_video([video])
    found, failed = model.encode_video([video, *videos(1)], on_error="skip")
    assert found.shape[0] == 1 and [f.index for f in failed] == [0]
    assert isinstance(failed[0].error, stoa_jax.UserError)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"boxes": np.full((4, 3, 4), 200.0)}, "fractions of the frame"),
        ({"boxes": np.zeros((4, 2, 4))}, "disagree"),
        ({"classes": np.zeros((4, 3))}, "integers"),
        ({"classes": np.full((4, 3), 7)}, "class 7 with 2 names"),
    ],
    ids=str,
)
def test_what_is_no_detection(model, change, words):
    (clip,) = boxed(1)
    bad = dataclasses.replace(clip.detections, **change)
    with pytest.raises(stoa_jax.UserError, match=words):
        model.match([stoa_jax.Clip(clip.video, detections=bad)], ["a dog"])


def test_calls_that_cannot_be(model):
    for call, words in (
        (lambda: model.encode_video([]), "empty"),
        (lambda: model.encode_text([]), "empty"),
        (lambda: model.encode_text([" "]), "no words"),
        (lambda: model.encode_text(["dog " * 50]), "text 0 has 50 pieces"),
        (lambda: model.encode_video("a.mp4"), "list"),
        (lambda: model.match(videos(2), ["a dog"], pairs=True), "2 videos and 1 texts"),
        (lambda: model.encode_video(videos(1), batch_size=0), "batch_size is 0"),
        (lambda: stoa_jax.load(FOLDER).caption(videos(1)), "language-model head"),
        (lambda: stoa_jax.load(FOLDER, dtype="int8"), "'int8'"),
        (lambda: model.threshold, "calibrate"),
    ):
        with pytest.raises(stoa_jax.UserError, match=words):
            call()
    assert model.encode_text(["dog " * 50], truncate=True).shape == (1, 96)


def test_detections_of_a_file(model, tmp_path):
    path = write_video(tmp_path / "one.mp4")
    row = {"objects": [{"box": [1, 1, 20, 20], "class": "dog", "score": 0.9}]}
    lines = [json.dumps({"video": "one", "frame": i, **row}) for i in range(4)]
    (tmp_path / "found.jsonl").write_text("\n".join(lines))
    clip = stoa_jax.Clip(path, detections=tmp_path / "found.jsonl")
    assert [t.name for t in model.explain(clip, "a dog runs").trajectories] == ["dog"]
    other = stoa_jax.Clip(shutil.copy(path, tmp_path / "two.mp4"), detections=clip.detections)
    with pytest.raises(stoa_jax.UserError, match="no detections of video 'two'"):
        model.match([other], ["a dog"])


def test_answers_and_calibration_travel(folder, tmp_path):
    source = shutil.copytree(folder, tmp_path / "source")
    note = {"version": 1, "temperature": 3.0, "threshold": 0.6}
    (source / "calibration.json").write_text(json.dumps(note))
    convert(source, tmp_path / "one.safetensors", "safetensors")
    model = stoa_jax.load(tmp_path / "one.safetensors")
    assert model.threshold == 0.6 and model.answers == tuple(ANSWERS)
    assert model.fingerprint == stoa_jax.load(source).fingerprint


def test_a_model_made_from_a_clip_has_no_heads(tmp_path):
    convert(FOLDER, tmp_path / "new.safetensors", "safetensors")
    model = stoa_jax.load(tmp_path / "new.safetensors")
    assert not model.has & {"match", "caption", "answer"}
    with pytest.raises(stoa_jax.UserError, match="match head"):
        model.match(videos(1), ["a dog"])


def test_the_command_line_says_the_same(folder, model, tmp_path, capsys):
    path = str(write_video(tmp_path / "one.mp4"))
    assert cli.main(["caption", path, f"--model={folder}", "--beam=2", "--json"]) == 0
    row = json.loads(capsys.readouterr().out)
    assert row == {"video": path, "caption": model.caption([path], beam=2)[0]}
    assert cli.main(["match", path, f"--model={folder}", "--text=a dog", "--json"]) == 0
    row = json.loads(capsys.readouterr().out)
    assert row["probability"] == pytest.approx(model.match([path], ["a dog"])[0, 0], abs=1e-6)
    with pytest.raises(stoa_jax.UserError) as error:
        model.caption([path, "/none.mp4"])
    bad = ["caption", path, "/none.mp4", f"--model={folder}"]
    assert cli.main(bad) == 2
    assert capsys.readouterr().err.strip().splitlines()[-1] == f"error: {error.value}"
    assert cli.main([*bad, "--skip"]) == 1
