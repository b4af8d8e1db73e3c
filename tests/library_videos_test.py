"""Video files as users have them, through the calls of the library and through `stoa`."""

import dataclasses
import json
import os

import av
import numpy as np
import pytest
import saved_models
import videos
from clip_tiny import FOLDER
from safetensors.numpy import load_file

import stoa_jax
from stoa_jax import cli, weights
from stoa_jax.data import video
from stoa_jax.models.config import ModelConfig
from stoa_jax.weights.files import save_safetensors

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@pytest.fixture(scope="module")
def clip():
    return stoa_jax.load(FOLDER, frames=4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    config = dataclasses.replace(
        ModelConfig.tiny(), num_answers=2, text_depth=1, fusion_depth=1, vision_depth=2,
        object_block=1, action_block=1,
    )  # fmt: skip
    root = tmp_path_factory.mktemp("models")
    return saved_models.write_random(root / "tiny", config, answers=["red", "blue"])


@pytest.fixture(scope="module")
def model(folder):
    return stoa_jax.load(folder)


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    return str(videos.write(tmp_path_factory.mktemp("good") / "good.mp4", count=24, rate=12))


def audio(path):
    with av.open(str(path), "w") as out:
        stream = out.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        frame.sample_rate = 16000
        out.mux(stream.encode(frame))
        out.mux(stream.encode())


def no_frames(path):
    with av.open(str(path), "w") as out:
        stream = out.add_stream("mpeg4", rate=5)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        out.start_encoding()


def cut_short(path):
    data = videos.write(path, count=120, rate=12, codec="libx264").read_bytes()
    path.write_bytes(data[: len(data) // 2])


def damaged(path):
    """Garbage over all pictures; the table of packets is whole."""
    data = bytearray(videos.write(path, count=24, rate=12).read_bytes())
    first, last = data.index(b"mdat") + 4, data.index(b"moov") - 4
    data[first:last] = np.random.default_rng(0).bytes(last - first)
    path.write_bytes(bytes(data))


BAD = {
    "missing.mp4": (lambda path: None, "No such file"),
    "empty.mp4": (lambda path: path.write_bytes(b""), "empty file"),
    "text.mp4": (lambda path: path.write_text("no video " * 99), "not a video"),
    "sound.mp4": (audio, "only sound in it"),
    "frameless.mp4": (no_frames, "no video in it"),
    "short.mkv": (cut_short, r"truncated: \d\.\d s of 10\.\d s can be read"),
    "damaged.mp4": (damaged, "none of its frames can be decoded"),
    "folder.mp4": (os.mkdir, "not a regular file"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_is_named_with_the_same_words_everywhere(clip, good, tmp_path, capsys, name):
    make, words = BAD[name]
    path = tmp_path / name
    make(path)
    with pytest.raises(stoa_jax.UserError, match=words) as error:
        clip.encode_video([good, path])
    assert str(error.value).startswith(f"encode_video: video 1: {path}: ")
    vectors, failed = clip.encode_video([path, good, stoa_jax.Clip(path)], on_error="skip")
    assert [f.index for f in failed] == [0, 2] and str(path) in str(failed[0].error)
    np.testing.assert_array_equal(vectors, clip.encode_video([good]))
    if path.is_dir():
        return  # `stoa` looks for videos in a folder
    command = ["embed", good, str(path), f"--model={FOLDER}", "--frames=4", "--json"]
    assert cli.main(command) == 2
    output = capsys.readouterr()
    assert output.err.strip().splitlines()[-1] == f"error: {error.value}" and not output.out
    assert cli.main([*command, "--skip"]) == 1
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["video"] for row in rows] == [good, str(path)]
    assert rows[1]["error"] == str(error.value)


def test_every_call_skips_what_fails(model, good, tmp_path):
    missing = str(tmp_path / "missing.mp4")
    listed, texts = [missing, good, b"no video", good], ["a dog", "a cat", "red", "blue"]
    calls = {
        "encode_video": lambda v, t, **o: model.encode_video(v, **o),
        "match": lambda v, t, **o: model.match(v, ["a dog", "it rains"], **o),
        "match of pairs": lambda v, t, **o: model.match(v, t, pairs=True, **o),
        "caption": lambda v, t, **o: model.caption(v, beam=1, max_pieces=3, **o),
        "answer": lambda v, t, **o: model.answer(v, t, **o),
    }
    for name, call in calls.items():
        found, failed = call(listed, texts, on_error="skip", batch_size=2)
        assert [f.index for f in failed] == [0, 2], name
        assert all(isinstance(f.error, stoa_jax.UserError) for f in failed)
        wanted = call([good, good], [texts[1], texts[3]])
        if isinstance(wanted, np.ndarray):
            np.testing.assert_allclose(found, wanted, atol=1e-5, err_msg=name)
        elif name == "answer":
            assert [a[0].text for a in found] == [a[0].text for a in wanted]
        else:
            assert found == wanted, name
        with pytest.raises(stoa_jax.UserError, match=rf"video 0: {missing}: No such file"):
            call(listed, texts)
        none, all_failed = call(listed[:1], texts[:1], on_error="skip")
        assert len(none) == 0 and len(all_failed) == 1, name


def test_a_turned_video_is_seen_upright(clip, tmp_path):
    side = videos.write(tmp_path / "turned.mov", rotation=90)
    straight = videos.write(tmp_path / "straight.mov")
    frames, _ = video.read_frames(straight, 4)
    upright = [np.rot90(frame).copy() for frame in frames]  # counter-clockwise
    cosine = clip.encode_video([side])[0] @ clip.encode_video([upright])[0]
    lying = clip.encode_video([side])[0] @ clip.encode_video([straight])[0]
    assert cosine > 0.999 > lying
    found = stoa_jax.Detections(np.zeros((4, 0, 4)), np.zeros((4, 0), int), np.zeros((4, 0)), ())
    assert clip.encode_video([stoa_jax.Clip(side, detections=found)]).shape == (1, 24)


def test_time_decides_where_the_frame_rate_varies(clip, tmp_path):
    # 20 frames in the first second, 5 in the next four.
    pts = [i * 50 for i in range(20)] + [1000 + i * 800 for i in range(5)]
    path = videos.write(tmp_path / "vfr.mkv", 25, 20, pts=pts)
    middles = (np.arange(4) + 0.5) / 4 * video.probe(path).duration
    by_time = [max(i for i, p in enumerate(pts) if p <= 1000 * t) for t in middles]
    assert by_time != [3, 9, 15, 21]
    with av.open(str(path)) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    wanted = clip.encode_video([[frames[i] for i in by_time]])
    np.testing.assert_allclose(clip.encode_video([path]), wanted, atol=1e-5)


def test_damage_in_the_middle_loses_no_clip(clip, tmp_path):
    path = videos.write(tmp_path / "a.mp4", 60, 12, "libx264", gop=10)
    whole = clip.encode_video([path])
    data = bytearray(path.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 200] = np.random.default_rng(1).bytes(200)
    path.write_bytes(bytes(data))
    found = clip.encode_video([path])
    assert np.isfinite(found).all() and (found != whole).any()


def test_bytes_are_the_file(clip, good):
    content = open(good, "rb").read()
    np.testing.assert_array_equal(clip.encode_video([content]), clip.encode_video([good]))


def test_boxes_in_pixels_are_refused_with_the_value(model):
    frames = np.zeros((4, 40, 60, 3), np.uint8)
    boxes = np.tile(np.float32([10, 5, 55, 30]), (4, 1, 1))
    found = stoa_jax.Detections(boxes, np.zeros((4, 1), int), np.ones((4, 1)), ("dog",))
    words = r"a coordinate is 55; boxes are fractions of the frame: divide pixels by"
    with pytest.raises(stoa_jax.UserError, match=words):
        model.match([stoa_jax.Clip(frames, detections=found)], ["a dog"])


def test_detections_of_another_video_are_refused_by_stoa_too(folder, good, tmp_path, capsys):
    row = {"video": "other", "frame": 0, "objects": []}
    (tmp_path / "found.jsonl").write_text(json.dumps(row) + "\n")
    options = [f"--detections={tmp_path / 'found.jsonl'}", f"--model={folder}"]
    assert cli.main(["match", good, "--text=a dog", *options]) == 2
    said = capsys.readouterr().err
    assert "no detections of video 'good' in it (it has 1 video(s)); is it the file of" in said


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["caption", "{good}", "--model={clip}"], "has no language-model head; fine-tune it"),
        (["ask", "{good}", "--question=what", "--model={clip}"], "has no answer head"),
        (["match", "{good}", "--text=a dog", "--model={clip}"], "has no match head"),
        (["explain", "{good}", "a dog", "--model={clip}"], "has no match head"),
        (["match", "{good}", "--text= ", "--model={folder}"], "text 0 is ' ', which has no words"),
        (
            ["match", "{good}", "--text=" + "dog " * 60, "--model={folder}"],
            "text 0 has 60 pieces and the model reads",
        ),
        (["embed", "{good}", "--model=/no/model"], "/no/model: no such file or directory"),
        (["embed", "{good}"], "--model: name a model, for example --model=runs/retrieval"),
        (["embed", "{good}", "--model={clip}", "--batch-size=0"], "batch_size is 0; it must be"),
        (["embed", "{good}", "--model={clip}", "--start=9"], "starts at 9 s, but the video ends"),
        (["caption", "{good}", "--model={folder}", "--beam=0"], "beam is 0; it must be an integer"),
    ],
    ids=lambda x: x[0] if isinstance(x, list) else "",
)
def test_a_mistake_on_the_command_line_is_one_line(
    arguments, words, folder, good, capsys, monkeypatch
):
    monkeypatch.delenv("STOA_MODEL", raising=False)
    places = {"good": good, "clip": str(FOLDER), "folder": str(folder)}
    assert cli.main([a.format(**places) if "{" in a else a for a in arguments]) == 2
    output = capsys.readouterr()
    errors = [line for line in output.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and words in errors[0] and not output.out


def test_a_checkpoint_of_a_newer_version_is_named(tmp_path):
    fields = {**dataclasses.asdict(ModelConfig.tiny()), "smell": True}
    path = tmp_path / "new.safetensors"
    save_safetensors(path, {"x": np.zeros(1, np.float32)}, {weights.METADATA: json.dumps(fields)})
    words = r"new\.safetensors: its model has the field 'smell', which this version of"
    with pytest.raises(stoa_jax.UserError, match=words):
        stoa_jax.load(path)


def test_a_checkpoint_that_lacks_parameters_is_named(folder, tmp_path):
    params = load_file(folder / "model.safetensors")
    kept = {name: params[name] for name in sorted(params)[3:]}
    path = tmp_path / "part.safetensors"
    save_safetensors(path, kept, dict(weights.open_weights(folder)[0].metadata))
    with pytest.raises(stoa_jax.UserError, match=r"part\.safetensors: .* missing action/blocks/"):
        stoa_jax.load(path)
