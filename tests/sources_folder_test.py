"""A folder of your own clips: names, tables, captions of all kinds, and unusable rows."""

import json
import os

import pytest
from published_files import named, put, rows
from videos import write

from stoa_jax.data import sources
from stoa_jax.data.video import VideoError
from stoa_jax.errors import UserError


def folder(tmp_path, text, name="captions.csv", videos=("a.mp4", "deep/er/b.mkv")):
    for video in videos:
        path = tmp_path / video
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
    data = text if isinstance(text, bytes) else text.encode()
    (tmp_path / name).write_bytes(data)
    return sources.open_source("folder/captions", tmp_path)


def test_a_folder_by_path_name_and_stem(tmp_path):
    source = folder(
        tmp_path,
        "video,caption,split\n"
        'a.mp4,"A cat, asleep",train\n'
        "b,A dog,val\n"
        "deep/er/b.mkv,It runs,valid\n"
        "a,A cat again,\n",
    )
    assert rows(source) == {
        "train": [("a", ["A cat, asleep", "A cat again"])],
        "validation": [("deep/er/b", ["A dog", "It runs"])],
    }
    assert source.skipped == []
    assert source.class_names == ()


def test_rows_without_a_split_are_for_training_and_own_splits_stay(tmp_path):
    source = folder(tmp_path, "video,caption,split\na,x,\nb,y,holdout_2\n")
    assert list(source.splits) == ["train", "holdout_2"]
    source = folder(tmp_path, "caption,video\nx,a\ny,b\n")
    assert rows(source) == {"train": [("a", ["x"]), ("deep/er/b", ["y"])]}


def test_json_lines(tmp_path):
    lines = [
        {"video": "a.mp4", "caption": ["one", "two"]},
        {"video": "b", "caption": "three", "split": "test", "start": 1, "end": "2.5"},
    ]
    source = folder(tmp_path, "\n".join(map(json.dumps, lines)), "captions.jsonl")
    assert rows(source) == {
        "train": [("a", ["one", "two"])],
        "test": [("deep/er/b@1-2.5", ["three"])],
    }
    entry = source.splits["test"][0]
    assert (entry.start, entry.end) == (1.0, 2.5)


def test_missing_videos_are_entries_that_fail_by_name(tmp_path):
    source = folder(tmp_path, "video,caption\nnowhere.mp4,x\na.mp4,y\n")
    entry = source.splits["train"][0]
    with pytest.raises(VideoError, match=r"nowhere: .*nowhere\.mp4: No such file"):
        source.load(entry, 4, 64, 3)
    with pytest.raises(VideoError, match=r"a: .*a\.mp4: not a video"):
        source.load(source.splits["train"][1], 4, 64, 3)


def test_rows_that_cannot_be_used_are_named(tmp_path):
    source = folder(
        tmp_path,
        "video,caption,split,start,end\n"
        "a,,train,,\n"  # 2: no caption
        ",words,train,,\n"  # 3: no video
        "a,words,../up,,\n"  # 4: no split
        "a,words,train,2,1\n"  # 5: ends before it starts
        "a,words,train,x,1\n"  # 6: no number
        "a,too,many,fields,1,2,3\n"  # 7
        "a,too few\n"  # 8
        "b,good,train,,\n"
        "same,words,train,,\n",  # 10: two of that name
        videos=("a.mp4", "b.mp4", "x/same.mp4", "y/same.mp4", "unused.mp4"),
    )
    assert rows(source) == {"train": [("b", ["good"])]}
    assert [line for _, line in named(source)] == [2, 3, 4, 5, 6, 7, 8, 10, 0, 0, 0]
    text = "\n".join(str(s) for s in source.skipped)
    for words in (
        "captions.csv:2: a: caption: empty",
        "captions.csv:3: field 'video': '' names no video",
        "field 'split': '../up'",
        "field 'end': 1 is not after the start 2",
        "field 'start': 'x' is not a number of seconds",
        "7 fields, but the header has 5",
        "may be",
        "unused: video without a caption",
    ):
        assert words in text


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", r"captions\.csv:1: empty"),
        (
            b"video,text\na,b\n",
            r"captions\.csv:1: no column 'caption' in the header \(video, text\)",
        ),
        (b"video,caption,video\na,b,c\n", r"captions\.csv:1: two columns 'video'"),
        (b'video,"two\nlines"\na,b\n', r"captions\.csv:1: no column 'caption' .*two lines\)"),
        (b'video,caption\na,"x" y\n', r"captions\.csv:2: broken CSV"),
        (b'video,caption\na,x\nb,"never closed\n', r"captions\.csv:3: broken CSV"),
        (b'video,caption\na,"open\nb.mkv,swallowed"\n', r"csv:2: a quote .* runs into line 3"),
        (b"video,caption\na,caf\xe9\n", r"captions\.csv:2: byte 0xe9 is not UTF-8; convert"),
        ("video,caption\na,b\n".encode("utf-16"), r"captions\.csv: is UTF-16; save it as UTF-8"),
        (b"video,caption\n", r"no usable entry"),
        (
            b"video,caption\na,\n",
            r"no usable entry; the first: .*captions\.csv:2: a: caption: empty",
        ),
    ],
)
def test_a_broken_table_is_one_clear_error(tmp_path, content, message):
    with pytest.raises(UserError, match=message) as caught:
        folder(tmp_path, content)
    assert "\n" not in str(caught.value)


def test_a_mark_of_byte_order_crlf_and_quoted_lines(tmp_path):
    source = folder(tmp_path, b'\xef\xbb\xbfvideo,caption\r\na,"one\r\ntwo ""three"""\r\n')
    assert rows(source) == {"train": [("a", ['one two "three"'])]}


def test_captions_of_all_kinds(tmp_path):
    long = " ".join(["word"] * 10_000)
    captions = [long, "👩‍👩‍👧 runs", "כלב רץ \u200fבפארק", "a\x07b\x1b[31m\x00c\td", "\ud800lone"]
    lines = "\n".join(json.dumps({"video": "a", "caption": c}) for c in captions)
    source = folder(tmp_path, lines, "captions.jsonl")
    texts = list(source.splits["train"][0].texts)
    assert texts == [long, "👩‍👩‍👧 runs", "כלב רץ \u200fבפארק", "ab[31m c d", "\ufffdlone"]
    assert all(t.encode("utf-8") for t in texts)


def test_json_cut_short_and_other_lines(tmp_path):
    text = '{"video": "a", "caption": "x"}\n[1]\n{"video": "b", "caption": 3}\n{"video": "b", "cap'
    source = folder(tmp_path, text, "captions.jsonl")
    assert rows(source) == {"train": [("a", ["x"])]}
    words = [str(s) for s in source.skipped]
    assert "captions.jsonl:2: [1] is not a JSON object" in words[0]
    assert "captions.jsonl:3: b: caption: 3 is not a string" in words[1]
    assert "captions.jsonl:4: not JSON at column 16" in words[2]
    assert "(cut short?)" in words[2]


def test_what_is_no_folder(tmp_path):
    with pytest.raises(UserError, match=r"no captions\.csv \(video,caption\[,split\]\)"):
        sources.open_source("folder/captions", tmp_path)
    put(tmp_path, captions__csv="video,caption\n", captions__jsonl="")
    with pytest.raises(UserError, match="keep one"):
        sources.open_source("folder/captions", tmp_path)
    with pytest.raises(UserError, match="no such directory"):
        sources.open_source("folder/captions", tmp_path / "no")
    with pytest.raises(UserError, match=r"no data set 'x/y'.*msrvtt/qa"):
        sources.open_source("x/y", tmp_path)
    with pytest.raises(UserError, match="no option 'colour'"):
        sources.open_source("folder/captions", tmp_path, colour=1)


def test_links_that_lead_in_a_circle(tmp_path):
    (tmp_path / "in").mkdir()
    os.symlink(tmp_path, tmp_path / "in" / "circle")
    source = folder(tmp_path, "video,caption\na,x\n", videos=("in/a.mp4",))
    assert rows(source) == {"train": [("in/a", ["x"])]}


def test_a_clip_decoded(tmp_path):
    write(tmp_path / "a.mp4", 10, 10)
    source = folder(tmp_path, "video,caption\na,x\n", videos=())
    clip = source.load(source.splits["train"][0], 4, 32, 3)
    assert (clip.video_id, clip.texts, clip.answers) == ("a", ["x"], [])
    assert [f.shape for f in clip.frames] == [(32, 48, 3)] * 4
    assert clip.boxes.shape == (4, 3, 4) and (clip.classes == -1).all() and not clip.scores.any()
