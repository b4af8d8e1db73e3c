"""Arbitrary bytes must give a result, or a UserError of one line.

STOA_FUZZ=20000 pytest tests/fuzz_test.py      # inputs of each test; 30 by default
"""

import json
import os
import pickle
import time

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from published_files import CAPTIONS, NAMES, QA, WEBVID, msrvtt_data
from videos import write

from stoa_jax.data import sources, video
from stoa_jax.data.detections import open_detections
from stoa_jax.errors import UserError

EXAMPLES = int(os.environ.get("STOA_FUZZ", "30"))
SECONDS = (
    20.0  # of processor time, at most, for one input; a wait is the suite's time-out's to find
)

if "STOA_FUZZ" in os.environ:
    pytestmark = pytest.mark.timeout(0)  # a long run; SECONDS bounds each input

fuzz = settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize="STOA_FUZZ" not in os.environ,  # the short run is the same every time
    database=None,
    suppress_health_check=list(HealthCheck),
)


def outcome(action) -> str:
    """ "read" or "refused"; anything else is a failure."""
    started = time.process_time()
    try:
        action()
        result = "read"
    except UserError as error:
        message = str(error)
        assert message and "\n" not in message and len(message) < 2000, message
        result = "refused"
    assert time.process_time() - started < SECONDS
    return result


# Strings that have a meaning in some format.
TOKENS = [
    b"", b"\x00", b"\n", b"\r\n", b"\t", b",", b'"', b'""', b"{", b"}", b"[", b"]", b":", b"null",
    b"NaN", b"1e999", b"-1", b"99999999999999999999", b"\xef\xbb\xbf", b"\xff\xfe", b"\xe9",
    b"\\ud800", "👩‍👩‍👧".encode(), "\u202e".encode(), b"../", b"/", b"video0", b".mp4", b"true",
    b"\x80\x04", b"cos\nsystem\n", b"R.", b"\xff" * 8, b"=" * 5, b"A" * 300,
    b"moov", b"mdat", b"trak", b"stts", b"\x1a\x45\xdf\xa3", b"RIFF", b"LIST",
]  # fmt: skip

place = st.integers(0, 2**20)
edit = st.one_of(
    st.tuples(st.just("set"), place, st.binary(min_size=1, max_size=8)),
    st.tuples(st.just("insert"), place, st.sampled_from(TOKENS)),
    st.tuples(st.just("drop"), place, st.integers(1, 200)),
    st.tuples(st.just("repeat"), place, st.integers(1, 200)),
    st.tuples(st.just("flip"), place, st.integers(0, 7)),
    st.tuples(st.just("cut"), place, st.just(0)),
)
edits = st.lists(edit, min_size=1, max_size=8)


def mutated(data: bytes, changes) -> bytes:
    for kind, at, what in changes:
        at %= len(data) + 1
        if kind == "set":
            data = data[:at] + what + data[at + len(what) :]
        elif kind == "insert":
            data = data[:at] + what + data[at:]
        elif kind == "drop":
            data = data[:at] + data[at + what :]
        elif kind == "repeat":
            data = data[: at + what] + data[at:]
        elif kind == "flip" and at < len(data):
            data = data[:at] + bytes([data[at] ^ 1 << what]) + data[at + 1 :]
        elif kind == "cut":
            data = data[:at]
    return data


def jsonl(rows) -> bytes:
    return "\n".join(map(json.dumps, rows)).encode()


CLIP = "0001_American_Beauty_00.00.51.926-00.00.54.129"
LSMDC = f"{CLIP}\t1\t2\t3\t4\tSOMEONE lies.\n{CLIP}b\t1\t2\t3\t4\tIt shines.\n".encode()
CHOICE = {"clip_name": "video1", "options": list("abcde"), "answer": 0}
DIDEMO = [{"annotation_id": 1, "video": "a.avi", "description": "a dog", "times": [[0, 0]]}]
FOLDER = b'video,caption,split,start,end\na.mp4,"a cat, asleep",train,,\nb,a dog,val,1,2.5\n'
LISTS = {"train_list.txt": NAMES[0].encode(), "test_list.txt": NAMES[1].encode()}
MAPPING = {"youtube_mapping.txt": f"{NAMES[0]} vid5\n{NAMES[1]} vid9\n".encode()}
RETRIEVAL = {"MSRVTT_train.9k.csv": b"video_id\nvideo1\nvideo2\n"}
ANNOTATIONS = json.dumps(msrvtt_data(1, 2)).encode()
JSFUSION = b'key,vid_key,video_id,sentence\nret0,msr1,video7010,"a man, cooking"\n'

# set, the file that is mutated, its content, files beside it
READERS = {
    "folder csv": ("folder/captions", "captions.csv", FOLDER, {}),
    "folder jsonl": (
        "folder/captions",
        "captions.jsonl",
        jsonl([{"video": "a", "caption": ["x", "y"]}, {"video": "b", "caption": "z", "end": 2}]),
        {},
    ),
    "webvid": ("webvid/captions", "results_2M_train.csv", WEBVID.encode(), {}),
    "msrvtt captioning": ("msrvtt/captioning", "MSRVTT_data.json", ANNOTATIONS, {}),
    "msrvtt list": (
        "msrvtt/retrieval",
        "MSRVTT_train.9k.csv",
        RETRIEVAL["MSRVTT_train.9k.csv"],
        {"MSRVTT_data.json": ANNOTATIONS},
    ),
    "msrvtt 1k-A": ("msrvtt/retrieval", "MSRVTT_JSFUSION_test.csv", JSFUSION, {}),
    "msrvtt qa": ("msrvtt/qa", "train_qa.json", json.dumps(QA).encode(), {}),
    "msrvtt mc": ("msrvtt/multiple_choice", "msrvtt_mc_test.jsonl", jsonl([CHOICE, CHOICE]), {}),
    "msvd pickle": ("msvd/captioning", "raw-captions.pkl", pickle.dumps(CAPTIONS), LISTS),
    "msvd pickle 0": ("msvd/captioning", "raw-captions.pkl", pickle.dumps(CAPTIONS, 0), LISTS),
    "msvd text": (
        "msvd/retrieval",
        "AllVideoDescriptions.txt",
        f"# head\n{NAMES[0]} a squirrel eats\n{NAMES[1]} runs\n".encode(),
        LISTS,
    ),
    "msvd qa": ("msvd/qa", "train_qa.json", json.dumps(QA).encode(), MAPPING),
    "lsmdc": ("lsmdc/retrieval", "LSMDC16_annos_val.csv", LSMDC, {}),
    "didemo": ("didemo/retrieval", "val_data.json", json.dumps(DIDEMO).encode(), {}),
}


def look_at(source):
    """Do with a source what a build does, except decoding."""
    for entries in source.splits.values():
        for entry in entries:
            assert entry.video_id and entry.video_path
            for text in [entry.video_id, *entry.texts, *entry.answers]:
                assert text.strip() and text.encode("utf-8")
                assert not any(ord(c) < 32 for c in text)
    for skipped in source.skipped:
        assert skipped.error and "\n" not in str(skipped)


@pytest.fixture(scope="module")
def where(tmp_path_factory):
    directory = tmp_path_factory.mktemp("fuzz")
    for name in ("a.mp4", "b.mkv"):
        (directory / name).write_bytes(b"x")
    return directory


def read(where, name, content: bytes):
    dataset, file, _, beside = READERS[name]
    directory = where / name.replace(" ", "_")
    if not directory.exists():
        directory.mkdir()
        for other, data in beside.items():
            (directory / other).write_bytes(data)
        for video_name in ("a.mp4", "b.mkv"):
            (directory / video_name).write_bytes(b"x")
    (directory / file).write_bytes(content)
    return outcome(lambda: look_at(sources.open_source(dataset, directory)))


def test_the_readers_read_what_is_fuzzed(where):
    for name, (_, _, content, _) in READERS.items():
        assert read(where, name, content) == "read", name


@pytest.mark.parametrize("name", READERS)
@fuzz
@given(edits)
def test_readers(where, name, changes):
    read(where, name, mutated(READERS[name][2], changes))


@fuzz
@given(st.sampled_from(sorted(READERS)), st.binary(max_size=400))
def test_readers_on_any_bytes(where, name, content):
    read(where, name, content)


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=6,
)
KEYS = (
    "video caption split start end video_id question answer clip_name options sentences videos "
    "sen_id description times frame frames time width height objects box rect class score conf"
).split()
box = st.lists(st.floats(-50, 300, width=32), min_size=4, max_size=4)
thing = st.fixed_dictionaries(
    {
        "box": box | anything,
        "class": st.sampled_from(["cat", "dog"]) | anything,
        "score": st.floats(0, 1) | anything,
    }
)
sensible = {
    "video": st.sampled_from(["v", "a", "video1"]),
    "video_id": st.sampled_from(["video1", 5, 9]),
    "frame": st.integers(0, 3),
    "objects": st.lists(thing, max_size=4),
    "width": st.sampled_from([1, 200]),
    "caption": st.sampled_from(["a cat", list("abcde")]),
    "answer": st.integers(0, 5),
}
row = st.dictionaries(st.sampled_from(KEYS), anything, max_size=3).flatmap(
    lambda base: st.fixed_dictionaries({}, optional=sensible).map(lambda more: base | more)
)


@fuzz
@given(
    st.sampled_from([n for n, r in sorted(READERS.items()) if "json" in r[1]]),
    st.lists(row, max_size=4),
    st.booleans(),
)
def test_readers_on_any_json(where, name, rows, as_list):
    content = json.dumps(rows if as_list else {"sentences": rows}).encode()
    read(where, name, content if as_list or name == "msrvtt captioning" else jsonl(rows))


# --- detections ----------------------------------------------------------------------------------

THING = {"rect": [20, 10, 60, 50], "class": "cat", "conf": 0.5}
OURS = {
    "video": "v",
    "width": 200,
    "height": 100,
    "objects": [{"box": [1, 2, 30, 40], "class": "x", "score": 0.5}],
}
BOTTOM_UP = "image_id\timage_w\timage_h\tnum_boxes\tboxes\tfeatures\n" + "".join(
    f"v_{i}\t200\t100\t1\tAACgQQAAIEEAAHBCAABIQg==\tAAAA\n" for i in range(3)
)
DETECTIONS = {
    "ours": jsonl([OURS | {"frame": i, "time": i / 2} for i in range(3)]),
    "ours, by rank": jsonl([OURS | {"frame": i} for i in range(3)]),
    "a video a line": jsonl([{"video": "v", "frames": [OURS, OURS, OURS]}]),
    "vinvl": b"".join(b"v_%d.jpg\t%s\n" % (i, jsonl([{"objects": [THING]}])) for i in range(3)),
    "one video": json.dumps([{"objects": [THING]}] * 3).encode(),
    "bottom up": BOTTOM_UP.encode(),
}
INFO = video.ReadInfo(
    video.VideoInfo(200, 100, 30, 3.0, "mpeg4", 1), (0.1, 0.6, 1.1), (1, 6, 11), 200, 100, 0, 0
)


def use(path):
    found = open_detections(path)
    boxes, classes, scores, _ = found.objects("v", INFO, 3)
    assert boxes.shape == (3, 3, 4) and classes.shape == scores.shape == (3, 3)
    real = classes >= 0
    assert np.isfinite(boxes).all() and (boxes >= 0).all() and (boxes <= 1).all()
    assert (boxes[real][:, 2:] > boxes[real][:, :2]).all() and not boxes[~real].any()
    assert ((scores >= 0) & (scores <= 1)).all() and (classes < len(found.class_names)).all()


def detections_read(where, content: bytes):
    path = where / "v.json"
    path.write_bytes(content)
    return outcome(lambda: use(path))


def test_the_detections_read_what_is_fuzzed(where):
    for name, content in DETECTIONS.items():
        assert detections_read(where, content) == "read", name


@pytest.mark.parametrize("name", DETECTIONS)
@fuzz
@given(edits)
def test_detections(where, name, changes):
    detections_read(where, mutated(DETECTIONS[name], changes))


@fuzz
@given(st.lists(row, min_size=1, max_size=4), st.sampled_from(["lines", "list", "vinvl"]))
def test_detections_on_any_json(where, rows, form):
    if form == "vinvl":
        content = b"\n".join(b"v_%d\t%s" % (i, jsonl([r])) for i, r in enumerate(rows))
    else:
        content = jsonl(rows) if form == "lines" else json.dumps(rows).encode()
    detections_read(where, content)


# --- the decoder ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    directory = tmp_path_factory.mktemp("clips")
    small = {"count": 6, "rate": 6, "size": (32, 32), "gop": 3}
    made = [
        write(directory / "a.mp4", codec="libx264", **small),
        write(directory / "b.mov", codec="mpeg4", rotation=90, **small),
        write(directory / "c.mkv", codec="libx264", **small),
        write(directory / "d.avi", codec="mpeg4", **small),
        write(directory / "e.webm", codec="libvpx-vp9", **small),
        write(directory / "f.flv", codec="flv", **small),
        write(directory / "g.mp4", codec="mpeg4", sound=True, **small),
        write(directory / "h.mpg", codec="mpeg2video", count=6, rate=25, size=(32, 32), gop=3),
        write(directory / "i.ts", codec="libx264", **small),
    ]
    return directory, [path.read_bytes() for path in made]


def decode(path):
    frames, info = video.read_frames(path, 3, short_side=24, timeout=SECONDS)
    assert len(frames) == 3 == len(info.times)
    assert all(f.dtype == np.uint8 and f.ndim == 3 and f.shape[2] == 3 for f in frames)
    assert len({f.shape for f in frames}) == 1
    assert video.probe(path).frames == info.video.frames


def test_the_decoder_reads_what_is_fuzzed(clips):
    directory, contents = clips
    for content in contents:
        (directory / "x").write_bytes(content)
        assert outcome(lambda: decode(directory / "x")) == "read"


@fuzz
@given(st.integers(0, 8), edits)
def test_decoder(clips, which, changes):
    directory, contents = clips
    path = directory / "fuzzed"
    path.write_bytes(mutated(contents[which], changes))
    outcome(lambda: decode(path))


@fuzz
@given(
    st.integers(0, 8),
    st.floats() | st.none(),
    st.floats() | st.none(),
    st.integers(-2, 30),
    st.integers(0, 99),
)
def test_decoder_at_any_times(clips, which, start, end, num, short_side):
    directory, contents = clips
    path = directory / f"whole{which}"
    if not path.exists():
        path.write_bytes(contents[which])
    outcome(lambda: video.read_frames(path, num, start, end, short_side, timeout=SECONDS))
