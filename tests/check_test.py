import itertools
import json
import shutil

import numpy as np
import pytest
from PIL import Image
from videos import write

from stoa_jax import config
from stoa_jax.data.build.run import build
from stoa_jax.data.check import __main__ as command
from stoa_jax.data.check import contact_sheet, run
from stoa_jax.data.check import report as check_report


def configuration(name, train="train", evaluated="test"):
    c = config.default("retrieval", "tiny")
    c.data.sets = ((name, 1.0),)
    c.data.train_split, c.data.eval_split = train, evaluated
    return c


def folder(tmp_path, rows):
    manual = tmp_path / "manual"
    manual.mkdir()
    write(manual / "a.mp4", 6, 12)
    for name in ("b", "c", "d"):
        shutil.copy(manual / "a.mp4", manual / f"{name}.mp4")
    lines = ["video,caption,split", *(",".join(row) for row in rows)]
    (manual / "captions.csv").write_text("\n".join(lines) + "\n")
    return manual


def detections(path, videos, name="cat"):
    box = {"box": [24, 16, 72, 48], "class": name, "score": 0.5}
    with open(path, "w") as file:
        for video in videos:
            for i in range(12):
                row = {"video": video, "frame": i, "width": 96, "height": 64, "objects": [box]}
                file.write(json.dumps(row) + "\n")
    return path


GOOD = [
    ("a", "A cat runs", "train"),
    ("b", "Two cats sit and look", "train"),
    ("c", "A dog", "test"),
]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Build a small folder set with detections for two of three clips."""
    root = tmp_path_factory.mktemp("built")
    manual = folder(root, GOOD)
    found = detections(root / "found.jsonl", ["a", "c"])
    build("folder/captions", root / "data", manual, detections=found)
    return root


def test_a_good_set_is_comparable(built, capsys):
    report = run.check(configuration("folder/captions"), data_dir=built / "data")
    assert report.problems == []
    train = report.parts["folder/captions:train"]
    assert (train["built"], train["items"], train["role"]) == (2, 2, "train")
    numbers = train["statistics"]
    assert numbers["words_per_text"] == 4.0 and numbers["longest_text_words"] == 5
    assert numbers["objects_per_frame"] == 0.5 and numbers["frames_without_objects"] == 0.5
    assert numbers["top_classes"] == {"cat": 12}
    assert numbers["clips_without_objects"] == ["b"]
    assert "folder/captions:train: 1 clips without any object: b" in report.notes
    text = check_report.show(report)
    assert "folder/captions:train (train): 2 built; no published count" in text
    assert "comparable: found nothing" in text
    kept = json.loads((built / "data" / "check" / "check.json").read_text())
    assert kept["parts"]["folder/captions:test"]["built"] == 1


def test_the_sheet_shows_boxes_where_they_are_and_marks_nouns(built):
    report = run.check(configuration("folder/captions"), data_dir=built / "data")
    assert [s.rpartition("/")[2] for s in report.sheets] == [
        "folder-captions-train.png",
        "folder-captions-test.png",
    ]
    sheet = np.asarray(Image.open(report.sheets[0])).astype(int)
    ink = np.array(contact_sheet.colour(0))
    is_ink = np.abs(sheet - ink).sum(-1) == 0
    # The box of the first frame of clip a: from a quarter to three quarters, 2 pixels thick.
    top, left, height = contact_sheet._LINE + contact_sheet._MARGIN, contact_sheet._MARGIN, 200
    width = round(96 * 200 / 64)
    rows = np.flatnonzero(is_ink[top : top + height, left + width // 2 + 40])
    assert (rows.min(), rows.max()) == pytest.approx((height // 4, 3 * height // 4 - 1), abs=1)
    # "cat" in the caption below has the colour of its class; clip b has no objects.
    below = is_ink[top + height : top + height + 40]
    assert below.sum() >= 40
    assert not is_ink[top + height + 60 :].any()


def test_a_part_that_is_measured_is_no_test(built):
    c = configuration("folder/captions")
    c.eval.max_examples = 1
    report = run.check(c, data_dir=built / "data")
    assert report.problems == [
        "folder/captions:test: eval.max_examples=1 evaluates only a part of it"
    ]


def test_labels_cover_neither_each_other_nor_leave_the_frame():
    frame, box, taken = (100, 60), (95, 2, 99, 9), []
    for _ in range(4):
        x, y = contact_sheet._free_place((40, 13), box, frame, taken)
        taken.append((x, y, x + 40, y + 13))
    assert {x for x, *_ in taken} == {60}
    tops = sorted(y for _, y, _, _ in taken)
    assert tops[0] >= 0 and tops[-1] <= 60 - 13
    assert all(b - a >= 13 for a, b in itertools.pairwise(tops))


def test_words_from_right_to_left_stand_so():
    assert contact_sheet._in_order("a dog runs".split()) == ["a", "dog", "runs"]
    assert contact_sheet._in_order("כלב רץ בפארק".split()) == ["בפארק", "רץ", "כלב"]
    assert contact_sheet._in_order("כלב רץ by a tree".split()) == ["by", "a", "tree", "רץ", "כלב"]
    assert contact_sheet._in_order("the word כלב רץ here".split()) == "the word רץ כלב here".split()


def test_boxes_of_every_class_differ_in_colour():
    colours = {contact_sheet.colour(i) for i in range(100)}
    assert len(colours) > 95


def test_nouns_meet_classes():
    names = ["cat", "frying pan", "woman", "berry", "bus"]
    nouns = ["Cats", "pan", "women", "berries", "buses", "car", "cathedral"]
    assert contact_sheet.matched(nouns, names) == {
        "Cats": "cat",
        "pan": "frying pan",
        "women": "woman",
        "berries": "berry",
        "buses": "bus",
    }


def test_leaks_missing_and_unreadable_are_named_and_the_exit_code_tells(tmp_path, capsys):
    rows = [*GOOD, ("a", "the same", "test"), ("d", "bad file", "test"), ("gone", "x", "test")]
    manual = folder(tmp_path, [*rows, ("b", "", "test")])
    (manual / "d.mp4").write_bytes(b"no video")
    build("folder/captions", tmp_path / "data", manual)
    found = detections(tmp_path / "found.jsonl", ["a"])
    report = run.check(
        configuration("folder/captions"),
        data_dir=tmp_path / "data",
        manual_dir=manual,
        detections=found,
    )
    problems = "\n".join(report.problems)
    assert "1 of 2 clips are also in the training list folder/captions:train: a" in problems
    assert "1 videos are missing: gone" in problems
    assert "1 videos are unreadable: d; the first:" in problems
    assert "2 clips failed to build: d.mp4, gone" in problems
    notes = "\n".join(report.notes)
    assert "folder/captions: 3 videos lack detections: b, c, d" in notes
    assert (
        "1 rows were skipped; the first:" in notes and "captions.csv:8: b: caption: empty" in notes
    )
    assert "folder/captions:train: no objects at all; they are padding" in notes

    arguments = ["--config=configs/pretrain.py:folder", "--config.data.eval_split=test"]
    assert command.main([*arguments, f"--data-dir={tmp_path / 'data'}"]) == 1
    assert "NOT COMPARABLE: folder/captions:test: 1 of 2 clips are also" in capsys.readouterr().out


def test_the_command_line(built, capsys):
    data = f"--data-dir={built / 'data'}"
    good = ["--config=configs/pretrain.py:folder", "--config.data.eval_split=test", data]
    assert command.main(good) == 0
    assert command.main([data]) == 2
    assert "error: --config is missing" in capsys.readouterr().err
    assert command.main(["--config=configs/pretrain.py:nonsense", data]) == 2
    assert "error: configs/pretrain.py:nonsense: the sets are" in capsys.readouterr().err
    assert command.main([*good[:2], f"--data-dir={built / 'nothing'}"]) == 2
    assert "python -m stoa_jax.data.build folder/captions" in capsys.readouterr().err


# --- published sets, without their videos --------------------------------------------------------


def msrvtt(tmp_path, missing=0):
    """Write lists of the published size; 1k-A is in the last 2,990 videos."""
    manual = tmp_path / "msrvtt"
    manual.mkdir()
    sentences = [
        {"video_id": f"video{n}", "caption": f"caption {i}", "sen_id": 2 * n + i}
        for n in range(10000)
        for i in range(2)
    ]
    (manual / "MSRVTT_data.json").write_text(json.dumps({"sentences": sentences}))
    test = set(range(7010, 9010, 2))
    nine = [f"video{n}" for n in range(10000) if n not in test]
    (manual / "MSRVTT_train.9k.csv").write_text("\n".join(["video_id", *nine]))
    seven = [f"video{n}" for n in range(7010)]
    (manual / "MSRVTT_train.7k.csv").write_text("\n".join(["video_id", *seven]))
    lines = [f"ret{n},msr{n},video{n},a sentence" for n in sorted(test)[missing:]]
    header = "key,vid_key,video_id,sentence"
    (manual / "MSRVTT_JSFUSION_test.csv").write_text("\n".join([header, *lines]))
    options = [f"option {i}" for i in range(5)]
    choices = [
        {"clip_name": f"video{n}", "options": options, "answer": 0} for n in range(7010, 10000)
    ]
    (manual / "msrvtt_mc_test.jsonl").write_text("\n".join(map(json.dumps, choices)))
    return manual


def listed(report, part):
    return report.parts[part]["listed"]


def test_the_published_counts_and_the_leak_of_multiple_choice(tmp_path):
    manual = msrvtt(tmp_path)
    c = configuration("msrvtt/retrieval", train="train_7k")  # as configs/multiple_choice.py
    c.data.eval_set = "msrvtt/multiple_choice"
    how = {"manual_dir": manual, "data_dir": tmp_path / "none", "probe": 0}
    report = run.check(c, trained_on=["msrvtt/retrieval:train"], **how)
    assert listed(report, "msrvtt/multiple_choice:test") == 2990
    assert listed(report, "msrvtt/retrieval:train") == 9000
    leak = "1,990 of 2,990 clips are also in the training list msrvtt/retrieval:train: video"
    assert any(leak in p for p in report.problems)
    report = run.check(c, **how)
    assert listed(report, "msrvtt/retrieval:train_7k") == 7010
    assert not any("training list" in p for p in report.problems)


def test_a_part_of_a_published_test_is_not_comparable(tmp_path):
    manual = msrvtt(tmp_path, missing=7)
    report = run.check(
        configuration("msrvtt/retrieval"), manual_dir=manual, data_dir=tmp_path / "none", probe=0
    )
    problems = "\n".join(report.problems)
    assert "msrvtt/retrieval:test: 993 clips listed instead of the published 1000" in problems
    assert "msrvtt/retrieval:test: 993 videos are missing: video7024, video7026" in problems
    assert "is not in" in problems and "python -m stoa_jax.data.build msrvtt/retrieval" in problems
    assert not any("train" in p for p in report.problems)
