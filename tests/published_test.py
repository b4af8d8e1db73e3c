"""Each data set from published files: built, checked, and trained on for a few steps."""

import functools
import json
import pickle
import re
import shutil

import detection_files as found
import jax
import numpy as np
import pytest
import shipped_configs
import toy_run
import toy_source
from toy_tasks import SMALL
from videos import write

from stoa_jax import sharding, train, writers
from stoa_jax.data import builders, pipeline
from stoa_jax.data.build import __main__ as build_command
from stoa_jax.data.build.run import build
from stoa_jax.data.check.run import check

SETTINGS = builders.Settings(frames=4, objects=3, short_side=24)
CAPTIONS = ("a man runs", "two dogs play with a ball", "a cat eats")


def put(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))


def lines(rows):
    return "".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows)


# Each function writes the annotations of a set, and returns its videos by path.


def webvid(at):
    header = "videoid,name,page_idx,page_dir,duration,contentUrl"
    rows = [f'{i},"{CAPTIONS[i]}, 4k",{i},000001_000050,PT00H00M02S,http://x/{i}' for i in range(3)]
    put(at / "results_2M_train.csv", lines([header, *rows[:2]]))
    put(at / "results_2M_val.csv", lines([header, rows[2]]))
    return [f"videos/000001_000050/{i}.mp4" for i in range(3)]


def msrvtt(at):
    numbers = {"train": (0, 1), "val": (6513,), "test": (7010, 7012)}
    every = [n for part in numbers.values() for n in part]
    sentences = [
        {"video_id": f"video{n}", "caption": c, "sen_id": 10 * n + j}
        for n in every
        for j, c in enumerate(CAPTIONS)
    ]
    put(at / "MSRVTT_data.json", {"videos": [], "sentences": sentences})
    put(at / "MSRVTT_train.9k.csv", lines(["video_id", "video0", "video1", "video6513"]))
    put(at / "MSRVTT_train.7k.csv", lines(["video_id", "video0", "video1"]))
    put(
        at / "MSRVTT_JSFUSION_test.csv",
        lines(["key,vid_key,video_id,sentence", 'ret0,msr7010,video7010,"a man, running"']),
    )
    for part, some in numbers.items():
        put(at / f"{part}_qa.json", questions(some))
    options = [*CAPTIONS, "a car", "a tree"]
    choices = [
        {"clip_name": f"video{n}", "options": options, "answer": n % 5} for n in numbers["test"]
    ]
    put(at / "msrvtt_mc_test.jsonl", lines(choices))
    return [f"TrainValVideo/video{n}.mp4" for n in every]


def questions(numbers):
    return [
        {"category_id": 1, "video_id": n, "question": f"{q}?", "id": n, "answer": a}
        for n in numbers
        for q, a in (("who runs", "man"), ("what plays", "dog"))
    ]


def msvd(at):
    names = ["-4wsuPCjDBc_5_15", "mv89psg6zh4_33_46", "klteYv1Uv9A_27_33", "q8t7iSGAKik_12_32"]
    parts = {"train": (0, 1), "val": (2,), "test": (3,)}
    for part, some in parts.items():
        put(at / f"{part}_list.txt", lines(names[i] for i in some))
        put(at / f"{part}_qa.json", questions([i + 1 for i in some]))
    put(at / "youtube_mapping.txt", lines(f"{n} vid{i + 1}" for i, n in enumerate(names)))
    captions = {name: [c.split() for c in CAPTIONS] for name in names}
    (at / "raw-captions.pkl").write_bytes(pickle.dumps(captions, 2))
    return [f"YouTubeClips/{name}.avi" for name in names]


def lsmdc(at):
    clips = [f"0001_American_Beauty_00.00.5{i}.926-00.00.54.129" for i in range(4)]
    rows = [f"{c}\t1\t2\t1\t2\tSOMEONE runs, lies {i}." for i, c in enumerate(clips)]
    put(at / "LSMDC16_annos_training.csv", lines(rows[:2]))
    put(at / "LSMDC16_annos_val.csv", lines(rows[2:3]))
    put(at / "LSMDC16_challenge_1000_publictect.csv", lines(rows[3:]))
    return [f"0001_American_Beauty/{c}.avi" for c in clips]


def didemo(at):
    videos = [f"{i}@N00_2408598493_274c77d26a.mov" for i in range(4)]
    for part, some in {"train": videos[:2], "val": videos[2:3], "test": videos[3:]}.items():
        rows = [{"video": v, "description": c, "times": [[0, 0]]} for v in some for c in CAPTIONS]
        put(at / f"{part}_data.json", rows)
    return [f"videos/{v}" for v in videos]


def folder(at):
    rows = [f'2024/{i}.mkv,"A man runs, {i}",{"train" if i < 2 else "val"}' for i in range(3)]
    put(at / "captions.csv", lines(["video,caption,split", *rows]))
    return [f"2024/{i}.mkv" for i in range(3)]


def folder_of_lines(at):
    rows = [
        {"video": f"{i}", "caption": list(CAPTIONS), "split": "train" if i < 2 else "validation"}
        for i in range(3)
    ]
    put(at / "captions.jsonl", lines(rows))
    return [f"deep/er/{i}.webm" for i in range(3)]


# Detections of each video's four frames in each of the formats.


def things(vinvl=False):
    return [found.thing([10, 10, 60, 40], "dog", 0.9, vinvl)]


def vinvl_lines(path, videos):
    row = json.dumps({"objects": things(True)})
    put(path, lines(f"{v}_{t}.jpg\t{row}" for v in videos for t in range(4)))


def vinvl_directory(path, videos):
    for video in videos:
        put(path / f"{video}.json", [{"objects": things(True)}] * 4)


def bottom_up(path, videos):
    box = found.encode([10, 10, 60, 40], "<f4")
    rows = [f"{v}_{t}\t96\t64\t1\t{box}\tAAAA" for v in videos for t in range(4)]
    put(path, lines(["image_id\timage_w\timage_h\tnum_boxes\tboxes\tfeatures", *rows]))


def our_lines(path, videos):
    size = {"width": 96, "height": 64}
    rows = [{"video": v, "frame": t, "objects": things(), **size} for v in videos for t in range(4)]
    put(path, lines(rows))


# (task, set of a shipped configuration): what is built, from which files, with which detections
CASES = {
    ("pretrain", "webvid"): (["webvid/captions"], webvid, our_lines),
    ("pretrain", "folder"): (["folder/captions"], folder, None),
    ("captioning", "msrvtt"): (["msrvtt/captioning"], msrvtt, vinvl_lines),
    ("captioning", "msvd"): (["msvd/captioning"], msvd, vinvl_directory),
    ("retrieval", "msrvtt"): (["msrvtt/retrieval"], msrvtt, vinvl_directory),
    ("retrieval", "msvd"): (["msvd/retrieval"], msvd, bottom_up),
    ("retrieval", "lsmdc"): (["lsmdc/retrieval"], lsmdc, bottom_up),
    ("retrieval", "didemo"): (["didemo/retrieval"], didemo, our_lines),
    ("qa", "msrvtt"): (["msrvtt/qa"], msrvtt, our_lines),
    ("qa", "msvd"): (["msvd/qa"], msvd, vinvl_lines),
    ("multiple_choice", "msrvtt"): (
        ["msrvtt/retrieval", "msrvtt/multiple_choice"],
        msrvtt,
        bottom_up,
    ),
}


@pytest.fixture(scope="module", autouse=True)
def compiled_soon(tmp_path_factory):
    """Disable optimization, which few steps do not repay, and share compiled programs."""
    jax.config.update("jax_disable_most_optimizations", True)
    with toy_run.compiled_once(tmp_path_factory.mktemp("compiled")):
        yield
    jax.config.update("jax_disable_most_optimizations", False)


def videos_of(manual, files):
    """Write the annotations, and clips of two seconds at their paths."""
    manual.mkdir()
    first, *rest = [manual / name for name in files(manual)]
    for video in (first, *rest):
        video.parent.mkdir(parents=True, exist_ok=True)
    write(first, count=8, rate=4, codec="libvpx-vp9" if first.suffix == ".webm" else "mpeg4")
    for video in rest:
        shutil.copy(first, video)
    return [first, *rest]


def built(root, data, names, files, detected):
    """Build sets; return the directory of their files, and their detections."""
    videos = videos_of(root, files)
    objects = root.with_suffix(".objects") if detected else None
    if detected:
        paths = [video.relative_to(root).with_suffix("") for video in videos]
        # Our own lines name a video by its path, as `data.detect` does.
        detected(objects, [str(p) if detected is our_lines else p.name for p in paths])
    for name in names:
        summary = build(name, data, root, detections=objects, settings=SETTINGS)
        assert all(summary.built.values()) and not any(summary.failed.values())
        assert summary.skipped == summary.undetected == 0
        assert bool(summary.objects) == bool(detected)
    return root, objects


def shrunk(task, argument, data):
    """Return the shipped configuration with a small model and few steps."""
    c = shipped_configs.load(task).get_config(argument)
    c.model.update({**SMALL, "dtype": "float32"})
    c.model.num_answers = 2 if task == "qa" else 0
    # A program with a scipy callback would not be cached.
    c.data.dir, c.data.workers, c.loss.matching = str(data), 0, "device"
    c.train.update(dict(batch_size=8, steps=3, epochs=0.0))
    c.eval.every_steps = -1
    c.log.update(dict(every_steps=1, tensorboard=False, progress=False))
    return c


@pytest.fixture(scope="module")
def checked(tmp_path_factory):
    """Return (task, set) -> its configuration; the set is built and checked on first use."""
    root = tmp_path_factory.mktemp("published")

    @functools.cache
    def configuration(task, argument):
        names, files, detected = CASES[task, argument]
        # Multiple choice builds MSR-VTT's training list with its own detections.
        data = root / ("choice" if task == "multiple_choice" else "data")
        manual, objects = built(root / f"{task}-{argument}", data, names, files, detected)
        c = shrunk(task, argument, data)
        report = check(c, manual_dir=manual, detections=objects)
        # The only problem is that they are small, where the published size is known.
        assert all("instead of the published" in problem for problem in report.problems)
        assert bool(report.problems) == (argument not in ("webvid", "folder"))
        assert len(report.sheets) == 2
        assert (data / "failures.jsonl").read_text() == ""
        return c

    return configuration


def train_some_steps(c, workdir, monkeypatch):
    """Train on one device, and check that the losses are finite."""
    one = functools.partial(sharding.make_mesh, devices=jax.devices()[:1])
    monkeypatch.setattr(sharding, "make_mesh", lambda c, devices=None: one(c))
    train.train(c, workdir)
    rows = [r for r in writers.read_lines(workdir / "metrics.jsonl") if "loss" in r]
    assert [r["step"] for r in rows] == [1, 2, 3]
    assert all(np.isfinite(r["loss"]) for r in rows)


@pytest.mark.timeout(900)  # the first of a task compiles its program
@pytest.mark.parametrize(("task", "argument"), CASES)
def test_built_checked_and_trained_on(checked, tmp_path, monkeypatch, task, argument):
    train_some_steps(checked(task, argument), tmp_path / "run", monkeypatch)


@pytest.mark.timeout(900)
def test_all_sets_with_captions_in_a_mixture(checked, tmp_path, monkeypatch):
    some = [checked(*case) for case in CASES if case[0] not in ("qa", "multiple_choice")]
    c = some[0].copy_and_resolve_references()
    c.data.sets = tuple(pair for one in some for pair in one.data.sets)
    assert len(c.data.sets) == c.train.batch_size  # each has a clip in every batch
    train_some_steps(c, tmp_path / "run", monkeypatch)


def test_half_of_it_downloaded_and_then_the_rest(tmp_path, capsys):
    """Some videos are missing or truncated, and some lack detections; later all exist."""
    videos = videos_of(tmp_path / "msrvtt", msrvtt)
    whole = videos[0].read_bytes()
    objects = tmp_path / "found.jsonl"
    our_lines(objects, [f"TrainValVideo/{v.stem}" for v in videos if v.stem != "video7012"])
    videos[1].write_bytes(whole[: len(whole) // 2])
    videos[3].unlink()
    data = tmp_path / "data"
    command = ["msrvtt/captioning", f"--manual-dir={tmp_path / 'msrvtt'}", "--processes=1"]
    command += [f"--detections={objects}", "--frames=4", f"--data-dir={data}"]

    assert build_command.main(command) == 0
    said = capsys.readouterr().out
    assert re.findall(r"(\w+) +(\d) built +(\d) failed", said) == [
        ("train", "1", "1"),
        ("validation", "1", "0"),
        ("test", "1", "1"),
    ]
    assert "1 clips without detections; their objects are padding\n  listed in" in said
    assert "run the same command with --retry-failed" in said
    rows = [json.loads(line) for line in (data / "failures.jsonl").read_text().splitlines()]
    named = {row["video"]: row["error"] for row in rows}
    assert set(named) == {"video1", "video7010", "video7012"}
    assert f"{videos[3]}: No such file" in named["video7010"]
    assert "not a video" in named["video1"] and "no detections in" in named["video7012"]

    c = shrunk("captioning", "msrvtt", data)
    report = check(c, manual_dir=tmp_path / "msrvtt", detections=objects)
    test, files = report.parts["msrvtt/captioning:test"], "msrvtt/captioning (files)"
    assert test["missing_videos"] == ["video7010"]
    assert report.parts["msrvtt/captioning:train"]["unreadable"].keys() == {"video1"}
    assert report.parts[files]["without_detections"] == ["video7012"]
    assert "msrvtt/captioning:test: 1 videos are missing: video7010" in report.problems
    assert "msrvtt/captioning:test: 1 clips failed to build: video7010" in report.problems

    for video in (videos[1], videos[3]):
        video.write_bytes(whole)
    assert build_command.main([*command, "--retry-failed"]) == 0
    said = capsys.readouterr().out
    assert re.findall(r"(\w+) +(\d) built +(\d) failed", said) == [
        ("train", "2", "0"),
        ("validation", "1", "0"),
        ("test", "2", "0"),
    ]
    assert "retry" not in said
    # Finished clips were kept, and the set is as if all had been there at once.
    assert build_command.main([*command[:-1], f"--data-dir={tmp_path / 'once'}"]) == 0
    one, two = (toy_source.tree(d / "msrvtt") for d in (data, tmp_path / "once"))
    assert one == two
    assert "video7012" in (data / "failures.jsonl").read_text()  # still without detections


def test_a_folder_with_json_lines(tmp_path):
    built(tmp_path / "a", tmp_path / "data", ["folder/captions"], folder_of_lines, vinvl_lines)
    train = pipeline.open_split(tmp_path / "data", "folder/captions", "train")
    assert [train.metadata(i).texts for i in range(2)] == [CAPTIONS] * 2
    assert train.class_names == ("dog",)
    assert (train.read(1)["classes"][:, 0] == 0).all()
