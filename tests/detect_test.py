import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import saved_models
from videos import write

import stoa_jax
from stoa_jax.data import detect, sources
from stoa_jax.data.detections import detector, open_detections
from stoa_jax.data.video import read_frames
from stoa_jax.errors import UserError
from stoa_jax.inference import detections
from stoa_jax.models.config import ModelConfig


def fake(pictures):
    """Find the red corner in every frame, and a less confident object."""
    found = []
    for picture in pictures:
        height, width = picture.shape[:2]
        red = [0.0, 0.0, width / 4, height / 4]
        found.append([([0, 0, 9, 9], "thing", 0.3), (red, "red corner", 0.9)])
    return found


def folder(tmp_path):
    videos = tmp_path / "videos"
    (videos / "deep").mkdir(parents=True)
    write(videos / "a.mp4", 24, 12)
    write(videos / "deep" / "b.mkv", 6, 12)
    (videos / "bad.mp4").write_bytes(b"no video")
    return videos


def run(videos, out, detect=fake, frames=4):
    found = list(detector.find_videos(videos))
    return detector.detect_videos(found, detect, out, frames=frames, progress=False)


def test_what_is_written_is_what_the_build_reads(tmp_path):
    videos, out = folder(tmp_path), tmp_path / "out" / "found.jsonl"
    assert run(videos, out) == (2, 1)
    failures = (tmp_path / "out" / "found.jsonl.failures.jsonl").read_text()
    assert json.loads(failures)["video"] == "bad"
    (videos / "captions.csv").write_text("video,caption\na.mp4,x\nb,y\n")
    source = sources.open_source("folder/captions", videos, detections=out)
    assert source.class_names == ("red corner", "thing")
    for entry in source.splits["train"]:
        clip = source.load(entry, 4, 32, 3)
        np.testing.assert_allclose(clip.boxes[:, 0], [[0, 0, 0.25, 0.25]] * 4, atol=1e-3)
        np.testing.assert_array_equal(clip.classes, [[0, 1, -1]] * 4)
        # The box is on the red corner of the stored frame.
        height, width = clip.frames[0].shape[:2]
        inside = clip.frames[0][: height // 4 - 1, : width // 4 - 1].astype(int)
        assert (inside[..., 0] > inside[..., 1] + 80).all()


@pytest.mark.parametrize("cut", [1, 40, 200, 700, 1000])
def test_after_a_stop_it_goes_on_and_ends_with_the_same_lines(tmp_path, cut):
    videos, out = folder(tmp_path), tmp_path / "found.jsonl"
    run(videos, out)
    whole = out.read_bytes()
    assert cut < len(whole)
    out.write_bytes(whole[:-cut])
    seen = []
    run(videos, out, lambda pictures: seen.append(len(pictures)) or fake(pictures))
    assert out.read_bytes() == whole
    assert len(seen) <= 2
    run(videos, out, lambda pictures: pytest.fail("done videos are not looked at again"))
    assert out.read_bytes() == whole


def test_another_number_of_frames_and_other_files_are_left_alone(tmp_path):
    videos, out = folder(tmp_path), tmp_path / "found.jsonl"
    run(videos, out, frames=4)
    whole = out.read_bytes()
    for frames in (3, 6):
        with pytest.raises(UserError, match=f"other than {frames} frames"):
            run(videos, out, frames=frames)
    out.write_text('{"precious": 1}\n')
    with pytest.raises(UserError, match=r"the line at byte 0 is not a detection"):
        run(videos, out)
    assert out.read_text() == '{"precious": 1}\n'
    assert len(whole) > 100


def test_names_are_those_of_a_folder_set(tmp_path):
    videos = folder(tmp_path)
    write(videos / "a.avi", 3, 12)
    assert [name for name, _ in detector.find_videos(videos)] == ["a.avi", "a.mp4", "bad", "deep/b"]
    assert [name for name, _ in detector.find_videos(videos / "a.avi")] == ["a"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"contains no video \(\.3gp"):
        list(detector.find_videos(tmp_path / "empty"))


def test_shares_are_whole_and_stay_when_videos_are_added():
    videos = [(f"a/{i}", Path(f"a/{i}.mp4")) for i in range(100)]
    shares = [detector.share_of(videos, f"{i}/3") for i in (1, 2, 3)]
    assert sorted(v for share in shares for v in share) == sorted(videos) and all(
        20 < len(s) < 50 for s in shares
    )
    more = [*videos, ("added", Path("added.mp4"))]
    assert [v for v in detector.share_of(more, "2/3") if v in videos] == shares[1]
    for wrong in ("0/3", "4/3", "3", "a/b", "1/0"):
        with pytest.raises(UserError, match=f"--share={wrong}: write I/N"):
            detector.share_of(videos, wrong)


def test_without_a_model_one_line(tmp_path, capsys):
    arguments = [f"--videos={folder(tmp_path)}", "--model=nowhere", f"--out={tmp_path / 'o'}"]
    assert detect.main(["--videos=/nowhere/at/all", *arguments[1:]]) == 2
    assert capsys.readouterr().err == "error: --videos=/nowhere/at/all: no such file or directory\n"


def test_missing_packages_are_named_with_the_install_line(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    with pytest.raises(UserError, match=r"pip install -r requirements-torch\.txt"):
        detector.load_detector("nowhere", 0.1)


def tiny_yolos(directory):
    import torch
    from transformers import YolosConfig, YolosForObjectDetection, YolosImageProcessor

    torch.manual_seed(0)
    config = YolosConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=[64, 96],
        patch_size=16,
        num_detection_tokens=8,
        id2label={0: "cat", 1: "dog"},
        label2id={"cat": 0, "dog": 1},
    )
    YolosForObjectDetection(config).save_pretrained(directory)
    YolosImageProcessor(size={"height": 64, "width": 96}).save_pretrained(directory)


@pytest.mark.torch
def test_a_hugging_face_detector_end_to_end(tmp_path, capsys):
    videos = folder(tmp_path)
    tiny_yolos(tmp_path / "model")
    out = tmp_path / "found.jsonl"
    arguments = [f"--videos={videos}", f"--model={tmp_path / 'model'}", f"--out={out}"]
    assert detect.main([*arguments, "--frames=3", "--threshold=0.0", "--device=cpu"]) == 0
    assert "2 videos done, 0 already done, 1 failed" in capsys.readouterr().out
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(r["video"], r["frame"]) for r in rows] == [
        (v, i) for v in ("a", "deep/b") for i in range(3)
    ]
    assert {o["class"] for r in rows for o in r["objects"]} <= {"cat", "dog"}
    assert all(len(r["objects"]) == 8 for r in rows)
    assert all(0 <= o["score"] <= 1 for r in rows for o in r["objects"])
    assert (rows[0]["width"], rows[0]["height"]) == (96, 64)
    assert open_detections(out).class_names in (("cat",), ("dog",), ("cat", "dog"))
    whole = out.read_bytes()
    assert detect.main([*arguments, "--frames=3", "--threshold=0.0"]) == 0
    assert "0 videos done, 2 already done, 1 failed" in capsys.readouterr().out
    assert out.read_bytes() == whole


@pytest.mark.torch
def test_a_hugging_face_detector_runs_on_the_frames_of_a_clip(tmp_path):
    tiny_yolos(tmp_path / "model")
    path = write(tmp_path / "a.mp4", 24, 12)
    config = dataclasses.replace(ModelConfig.tiny(), text_depth=1, fusion_depth=1)
    model = stoa_jax.load(saved_models.write_random(tmp_path / "stoa", config))
    detect_objects = stoa_jax.load_detector(tmp_path / "model", 0.0)
    table = detect_objects(np.stack(read_frames(path, config.frames, None, None, 256)[0]))
    assert set(table.names) <= {"cat", "dog"} and (table.classes >= 0).all()
    run, given = (stoa_jax.Clip(path, detections=d) for d in (detect_objects, table))
    with pytest.warns(UserWarning, match="not calibrated"):  # and not of missing detections
        probability = model.match([run, given, run], ["a dog"])
    np.testing.assert_allclose(probability, probability[:1].repeat(3, 0), atol=1e-6)


def test_lists_of_objects_become_detections():
    frames = [[([0, 5, 20, 10], "dog", 0.9), ([-1, 0, 41, 20], "cat", 0.5)], []]
    found = detections.of_lists(frames, height=20, width=40)
    assert found.names == ("cat", "dog")
    np.testing.assert_allclose(found.boxes[0], [[0, 0.25, 0.5, 0.5], [0, 0, 1, 1]])
    np.testing.assert_array_equal(found.classes, [[1, 0], [-1, -1]])
    detections.checked(found, 2, "detections")


@pytest.mark.torch
def test_a_directory_that_is_no_detector(tmp_path):
    with pytest.raises(UserError, match="not an object-detection model"):
        detector.load_detector(tmp_path / "nowhere", 0.1)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="not an object-detection model"):
        detector.load_detector(tmp_path, 0.1)
