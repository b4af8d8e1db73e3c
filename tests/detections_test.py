import json
import pickle

import numpy as np
import pytest
from detection_files import encode, thing

from stoa_jax.data import video
from stoa_jax.data.detections import align, distinct, formats, matching, open_detections
from stoa_jax.errors import UserError

WIDTH, HEIGHT = 200, 100
CAT, DOG = [20, 10, 60, 50], [100, 0, 200, 100]


def info(times=(0.5, 1.5, 2.5), frames=30, rate=10, size=(WIDTH, HEIGHT)):
    about = video.VideoInfo(*size, frames, frames / rate, "mpeg4", 1)
    return video.ReadInfo(
        about, tuple(times), tuple(int(t * rate) for t in times), *size, seeks=0, damaged=0
    )


def objects(vinvl=False):
    """Return three frames: a cat, a cat and a more confident dog, nothing."""
    return [
        [thing(CAT, "cat", 0.5, vinvl)],
        [thing(CAT, "cat", 0.5, vinvl), thing(DOG, "dog", 0.75, vinvl)],
        [],
    ]


def write_lines(path, video="v", sized=True, timed=False, frames=None):
    lines = []
    for i, found in enumerate(frames if frames is not None else objects()):
        line = {"video": video, "frame": i, "objects": found}
        line |= {"width": WIDTH, "height": HEIGHT} if sized else {}
        line |= {"time": i + 0.5} if timed else {}
        lines.append(json.dumps(line))
    path.write_text("\n".join(lines) + "\n")
    return path


def write_vinvl(path, key="v_{}.jpg"):
    rows = [f"{key.format(i)}\t{json.dumps({'objects': o})}" for i, o in enumerate(objects(True))]
    path.write_text("\n".join(rows) + "\n")
    return path


def write_directory(path, video="v"):
    path.mkdir()
    frames = [{"objects": found} for found in objects(True)]
    (path / f"{video}.json").write_text(json.dumps(frames))
    return path


def write_bottom_up(path, header=True):
    names = ["image_id", "image_w", "image_h", "num_boxes", "boxes", "features"]
    lines = ["\t".join(names)] if header else []
    for i, boxes in enumerate([[CAT], [CAT, DOG], []]):
        cells = [
            f"v_{i}",
            WIDTH,
            HEIGHT,
            len(boxes),
            encode(boxes, "<f4"),
            encode([1.0] * 9, "<f4"),
        ]
        lines.append("\t".join(map(str, cells)))
    path.write_text("\n".join(lines) + "\n")
    return path


UNIT_CAT, UNIT_DOG = [0.1, 0.1, 0.3, 0.5], [0.5, 0.0, 1.0, 1.0]


@pytest.mark.parametrize(
    "make",
    [
        lambda d: write_lines(d / "a.jsonl"),
        lambda d: write_lines(d / "a.jsonl", sized=False),
        lambda d: write_lines(d / "a.jsonl", timed=True),
        lambda d: write_vinvl(d / "predictions.tsv"),
        lambda d: write_vinvl(d / "predictions.tsv", "v/frame_{:05d}.png"),
        lambda d: write_directory(d / "json"),
        lambda d: write_directory(d / "json") / "v.json",
        lambda d: write_directory(d / "json", "v_[0]_[31]"),
    ],
)
def test_the_same_objects_from_every_format(tmp_path, make):
    found = open_detections(make(tmp_path))
    found = pickle.loads(pickle.dumps(found))  # as build processes receive it
    assert found.class_names == ("cat", "dog") and found.problems == []
    assert "v" in found and "v.mp4" in found and "w" not in found and len(found) == 1
    boxes, classes, scores, left_out = found.objects("v", info(), 3)
    assert boxes.shape == (3, 3, 4) and boxes.dtype == np.float32
    np.testing.assert_array_equal(classes, [[0, -1, -1], [1, 0, -1], [-1, -1, -1]])
    np.testing.assert_allclose(scores, [[0.5, 0, 0], [0.75, 0.5, 0], [0, 0, 0]])
    np.testing.assert_allclose(boxes[0, 0], UNIT_CAT, atol=1e-6)
    np.testing.assert_allclose(boxes[1, :2], [UNIT_DOG, UNIT_CAT], atol=1e-6)
    assert not boxes[classes < 0].any() and left_out == []


@pytest.mark.parametrize("header", [True, False])
def test_bottom_up_attention(tmp_path, header):
    found = open_detections(write_bottom_up(tmp_path / "a.tsv", header))
    assert found.class_names == ("object",) and found.problems == []
    boxes, classes, scores, _ = found.objects("v", info(), 2)
    np.testing.assert_array_equal(classes, [[0, -1], [0, 0], [-1, -1]])
    np.testing.assert_allclose(boxes[1], [UNIT_CAT, UNIT_DOG], atol=1e-6)
    np.testing.assert_array_equal(scores[1], [1, 1])


def test_bottom_up_attention_with_classes(tmp_path):
    names = ["img_id", "img_h", "img_w", "objects_id", "objects_conf", "num_boxes", "boxes"]
    cells = ["v_0", 100, 200, encode([7], "<i8"), encode([0.25], "<f4"), 1, encode([CAT], "<f4")]
    path = tmp_path / "a.tsv"
    path.write_text("\t".join(names) + "\n" + "\t".join(map(str, cells)) + "\n")
    found = open_detections(path)
    assert found.class_names == ("7",)
    boxes, _, scores, _ = found.objects("v", info((1.0,)), 1)
    np.testing.assert_allclose(boxes[0, 0], UNIT_CAT, atol=1e-6)
    assert scores[0, 0] == 0.25


def test_a_line_may_hold_a_whole_video(tmp_path):
    frames = [{"objects": o, "time": i + 0.5} for i, o in enumerate(objects())]
    line = {"video": "a/b.mp4", "width": WIDTH, "height": HEIGHT, "frames": frames}
    (tmp_path / "a.jsonl").write_text(json.dumps(line))
    found = open_detections(tmp_path / "a.jsonl")
    assert "a/b" in found and "b" not in found
    np.testing.assert_array_equal(found.objects("a/b", info(), 1)[1], [[0], [1], [-1]])


def test_a_video_is_found_by_its_file_name_and_whatever_its_times(tmp_path):
    found = open_detections(write_lines(tmp_path / "a.jsonl", video="clip"))
    assert "deep/down/clip" in found and "deep/down/clip@1-2.5" in found


def test_frames_by_time(tmp_path):
    found = open_detections(write_lines(tmp_path / "a.jsonl", timed=True))  # 0.5, 1.5, 2.5 s
    _, classes, *_ = found.objects("v", info((0.6, 1.3, 1.6, 2.9, 9.0)), 2)
    np.testing.assert_array_equal(classes[:, 0], [0, 1, 1, -1, -1])
    with pytest.raises(video.VideoError, match=r"from 0\.50 to 2\.50 s, none near .* 50\.00 to 50"):
        found.objects("v", info((50.0,)), 2)


def frame(number, time=None):
    empty = np.zeros((0, 4))
    return formats.Frame("v", number, time, None, empty, [], np.zeros(0), number + 1)


def test_frames_by_rank_and_by_place_in_the_video():
    about = info((0.5, 1.5, 2.5), frames=30)  # frames 5, 15, 25
    assert [f.number for f in align([frame(i) for i in (1, 2, 3)], about, "")] == [1, 2, 3]
    places = [frame(i) for i in (0, 4, 9, 14, 19, 24, 29)]
    assert [f.number for f in align(places, about, "")] == [4, 14, 24]
    every = [frame(i) for i in range(30)]
    assert [f.number for f in align(every, about, "")] == [5, 15, 25]
    with pytest.raises(video.VideoError, match="detections of 8 frames where 3 are sampled"):
        align([frame(i) for i in range(8)], about, "file: v")
    with pytest.raises(video.VideoError, match="detections of 2 frames"):
        align([frame(5), frame(500)], about, "file: v")
    assert align([], about, "") == [None] * 3


def test_the_surest_distinct_objects_are_kept():
    boxes = np.array(
        [
            [0, 0, 1, 1],
            [0, 0, 1, 1],  # the same again
            [0.01, 0, 1, 1],  # nearly the same
            [0.01, 0, 1, 1],  # the same box, another class
            [0, 0, 0.5, 1],  # the same class, another box
            [0.3, 0.3, 0.3, 0.9],  # no area
        ]
    )
    classes = np.array([4, 4, 4, 5, 4, 4])
    scores = np.array([0.3, 0.9, 0.8, 0.2, 0.1, 1.0])
    assert distinct(boxes, classes, scores, 10).tolist() == [1, 3, 4]
    assert distinct(boxes, classes, scores, 2).tolist() == [1, 3]
    assert distinct(boxes[:0], classes[:0], scores[:0], 2).tolist() == []


def test_equal_scores_keep_the_order_of_the_file():
    boxes = np.array([[0, 0, 1, 0.1 * i] for i in range(1, 6)])
    assert distinct(boxes, np.arange(5), np.ones(5), 3).tolist() == [0, 1, 2]


BAD_BOXES = [
    ([60, 10, 20, 50], "1 inverted or without area"),
    ([20, 10, 20, 50], "1 inverted or without area"),
    ([float("nan"), 10, 60, 50], "1 not finite"),
    ([20, 10, float("inf"), 50], "1 not finite"),
    ([300, 10, 400, 50], "1 outside the image"),
    ([-50, -50, -10, -10], "1 outside the image"),
    ([20, 10, 60], "1 without a box of four numbers"),
    (["20", 10, 60, 50], "1 without a box of four numbers"),
    (None, "1 without a box of four numbers"),
]


@pytest.mark.parametrize("box, words", BAD_BOXES)
def test_bad_boxes_are_dropped_and_named(tmp_path, box, words):
    path = write_lines(tmp_path / "a.jsonl", frames=[[thing(box, "x", 0.9), *objects()[0]], [], []])
    found = open_detections(path)
    (problem,) = found.problems
    assert (problem.video, problem.line, problem.file) == ("v", 1, str(path))
    assert words in problem.error and problem.error.startswith("objects dropped: ")
    assert found.class_names == ("cat",)
    np.testing.assert_array_equal(found.objects("v", info(), 2)[1][0], [0, -1])


def test_boxes_that_reach_over_the_edge_are_cut(tmp_path):
    path = write_lines(
        tmp_path / "a.jsonl", frames=[[thing([-20, 50, 100, 150], "x", 0.9)], [], []]
    )
    boxes, *_ = open_detections(path).objects("v", info(), 1)
    np.testing.assert_allclose(boxes[0, 0], [0, 0.5, 0.5, 1.0])


def test_boxes_known_to_be_outside_only_beside_the_video_are_named(tmp_path):
    frame = [thing([20, 10, 60, 50], "x", 0.9), thing([300, 10, 400, 50], "x", 0.8)]
    path = write_lines(tmp_path / "a.jsonl", sized=False, frames=[frame, frame[:1], frame[:1]])
    found = open_detections(path)
    read = []
    parse = found._parse
    found._parse = lambda offset, line: read.append(line) or parse(offset, line)
    _, classes, _, left_out = found.objects("v", info(), 2)
    np.testing.assert_array_equal(classes, [[0, -1]] * 3)
    assert read == [1, 2, 3]  # once
    assert left_out == [
        "1 of 4 boxes of the sampled frames lie outside the 200x100 picture; left out"
    ]


def test_pixels_of_another_size_and_shares_are_refused(tmp_path):
    big = [[thing([400, 200, 800, 400], "x", 0.9)]] * 3
    path = write_lines(tmp_path / "a.jsonl", sized=False, frames=big)
    with pytest.raises(video.VideoError, match=r"lie outside the 200x100 picture .* 800, 400"):
        open_detections(path).objects("v", info(), 1)
    small = [[thing([0.1, 0.2, 0.9, 1.0], "x", 0.9)]] * 3
    path = write_lines(tmp_path / "a.jsonl", sized=False, frames=small)
    with pytest.raises(video.VideoError, match="fractions, not pixels"):
        open_detections(path).objects("v", info(), 1)


def test_bad_lines_are_named_and_the_clip_fails_where_frames_are_missing(tmp_path):
    path = write_lines(tmp_path / "a.jsonl")
    lines = path.read_text().splitlines()
    bad = [
        '{"video": "v", "fra',
        '{"video": 3, "objects": []}',
        '{"video": "v", "frame": -1}',
        "[]",
    ]
    bad += ['{"video": "v", "frame": 1, "objects": 5}', '{"video": "v", "frame": 7, "width": 0}']
    path.write_text("\n".join([*lines[:2], *bad]))
    found = open_detections(path)
    assert [p.line for p in found.problems] == [3, 4, 5, 6, 7, 8]
    assert "not JSON at column" in found.problems[0].error
    with pytest.raises(video.VideoError, match="detections of 2 frames where 3 are sampled"):
        found.objects("v", info(), 1)


def test_a_frame_twice_is_refused(tmp_path):
    path = write_lines(tmp_path / "a.jsonl")
    path.write_text(path.read_text() * 2)
    with pytest.raises(video.VideoError, match=r"jsonl:4: frame 0 of v is also on line 1"):
        open_detections(path).objects("v", info(), 1)


@pytest.mark.parametrize(
    "row, words",
    [
        ("v_0\t200\t100\t2\tAAAA\tx", "field 'boxes': 3 bytes instead of 32"),
        ("v_0\t200\t100\t1\t!!!\tx", "field 'boxes': not base64"),
        ("v_0\t200\t100\tmany\tAAAA\tx", "field 'num_boxes'"),
        ("v_0\t0\t100\t0\t\tx", "field 'image_w'"),
        ("v_0\t200\t100\t0", "4 fields, not 6"),
        ("\t200\t100\t0\t\tx", "image key is empty"),
        ("v_0\t200\t100\t99999999999\tAAAA\tx", "field 'boxes'"),
    ],
)
def test_bad_rows_of_a_table(tmp_path, row, words):
    path = write_bottom_up(tmp_path / "a.tsv")
    path.write_text(path.read_text() + row + "\n")
    (problem,) = open_detections(path).problems
    assert words in problem.error and problem.line == 5


@pytest.mark.parametrize(
    "content, words",
    [
        (b"", "empty"),
        (b"\n\n", "empty"),
        (b"hello\n", "in an unknown format"),
        (b"\x00\xff" * 50, "in an unknown format"),
        (b"image_id\tboxes\n", "no column 'image_w'"),
        (b'{"video": "v", "fr', "no line with detections; the first problem: .*:1: not JSON"),
        (b'{"a": 1}', "no file with detections; the first: .*holds no list of frames"),
        (b"[1, 2", "no file with detections; the first: .*not JSON"),
        (b"v_1\t{broken\n", "no line with detections"),
    ],
)
def test_files_that_are_no_detections(tmp_path, content, words):
    path = tmp_path / "a.txt"
    path.write_bytes(content)
    with pytest.raises(UserError, match=words) as caught:
        open_detections(path)
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="no such file"):
        open_detections(tmp_path / "none")
    (tmp_path / "d").mkdir()
    with pytest.raises(UserError, match=r"no \.json file"):
        open_detections(tmp_path / "d")


def test_keys_of_pictures():
    split = formats.split_key
    assert split("video7010_3.jpg") == ("video7010", 3)
    assert split("video7010/000012") == ("video7010", 12)
    assert split("-4wsuPCjDBc_5_15_frame_7.png") == ("-4wsuPCjDBc_5_15", 7)
    assert split("a.b-c.12") == ("a.b-c", 12)
    assert split("video7010") == ("video7010", 0)


def test_the_index_of_a_large_file_is_kept_and_renewed(tmp_path, monkeypatch):
    monkeypatch.setattr(matching, "_CACHE_FROM", 1)
    path = write_lines(tmp_path / "a.jsonl")
    first = open_detections(path)
    kept = tmp_path / "a.jsonl.index"
    assert sorted(p.name for p in kept.iterdir()) == ["index.json", "rows.npy"]
    monkeypatch.setattr(matching, "_build_index", lambda *a: pytest.fail("read again"))
    again = open_detections(path)
    for one, two in zip(first.objects("v", info(), 2), again.objects("v", info(), 2), strict=True):
        np.testing.assert_array_equal(one, two)
    monkeypatch.undo()
    monkeypatch.setattr(matching, "_CACHE_FROM", 1)
    write_lines(path, video="other")
    assert "other" in open_detections(path) and "v" not in open_detections(path)
    (kept / "index.json").write_text("{")
    assert "other" in open_detections(path)


def test_one_video_of_many_is_read_without_the_others(tmp_path, monkeypatch):
    path = tmp_path / "predictions.tsv"
    with open(path, "w") as file:
        for i in range(300):
            for j in range(3):
                found = [thing(CAT, "cat", 0.5, True)] if i == 137 else []
                file.write(f"video{i}_{j}\t{json.dumps({'objects': found})}\n")
    found = open_detections(path)
    assert len(found) == 300
    read = []
    parse = found._parse
    found._parse = lambda offset, line: read.append(line) or parse(offset, line)
    assert found.objects("video137", info(), 1)[1].tolist() == [[0], [0], [0]]
    assert read == [137 * 3 + 1, 137 * 3 + 2, 137 * 3 + 3]
