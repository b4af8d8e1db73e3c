import csv
import io
import json
import os
import pickle
import pickletools

import pytest
from video_test import write

from stoa_jax.data import sources
from stoa_jax.data.sources import entries, files, msrvtt, msvd, webvid
from stoa_jax.data.video import VideoError
from stoa_jax.errors import UserError


def put(directory, **contents):
    """Files by name (`__` for a dot, `___` for a slash), of text, bytes or JSON."""
    for name, content in contents.items():
        path = directory / name.replace("___", "/").replace("__", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, bytes):
            path.write_bytes(content)
        elif isinstance(content, str):
            path.write_text(content, encoding="utf-8")
        else:
            path.write_text(json.dumps(content))


def rows(source):
    return {s: [(e.video_id, list(e.texts)) for e in v] for s, v in source.splits.items()}


def named(source):
    return [(s.video, s.line) for s in source.skipped]


# --- folder --------------------------------------------------------------------------------------


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


def test_a_missing_video_belongs_beside_the_others(tmp_path):
    put(tmp_path, MSRVTT_data__json=msrvtt_data(1, 2), clips___all___video1__mp4=b"x")
    paths = [e.video_path for e in captioning(tmp_path)]
    assert paths == [str(tmp_path / "clips" / "all" / f"video{n}.mp4") for n in (1, 2)]
    put(tmp_path, more___video9__mp4=b"x")
    assert captioning(tmp_path)[1].video_path == str(tmp_path / "videos" / "video2.mp4")


def captioning(root):
    return sources.open_source("msrvtt/captioning", root).splits["train"]


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
        "field 'start': 'x' is no number of seconds",
        "7 fields where the header has 5",
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
        (b'video,caption\na,"open\nb.mkv,swallowed"\n', r"csv:2: a quote .* takes in line 3"),
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
    assert "captions.jsonl:2: [1] is no JSON object" in words[0]
    assert "captions.jsonl:3: b: caption: 3 is no text" in words[1]
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


# --- WebVid --------------------------------------------------------------------------------------

WEBVID = (
    "videoid,name,page_idx,page_dir,duration,contentUrl\n"
    '1066674784,"Cat, the ""king"", sleeps",1,000001_000050,PT00H00M05S,http://example.invalid/1\n'
    "0021,Plain words,2,012851_012900,PT00H00M09S,http://example.invalid/2\n"
    '33,"Two\nlines",3,000101_000150,PT,u\n'
)


def test_webvid_keeps_leading_zeros_and_quoted_commas(tmp_path):
    put(tmp_path, results_2M_train__csv=WEBVID)
    source = sources.open_source("webvid/captions", tmp_path)
    found = [(e.video_id, e.video_path, list(e.texts)) for e in source.splits["train"]]
    base = tmp_path / "videos"
    assert found == [
        ("1066674784", f"{base}/000001_000050/1066674784.mp4", ['Cat, the "king", sleeps']),
        ("0021", f"{base}/012851_012900/0021.mp4", ["Plain words"]),
        ("33", f"{base}/000101_000150/33.mp4", ["Two lines"]),
    ]
    assert source.skipped == []
    again = pickle.loads(pickle.dumps(source.splits["train"]))
    assert [e.video_id for e in again[1:]] == ["0021", "33"]


def test_webvid_names_what_it_skips(tmp_path):
    bad = (
        WEBVID
        + "44,,4,000001,PT,u\n55,few,5\n../66,name,6,000001,PT,u\n77,name,7,a/b,PT,u\n"
        + "33,again,3,1,PT,u\n"
    )
    put(tmp_path, results_2M_val__csv=bad)
    source = sources.open_source("webvid/captions", tmp_path)
    assert len(source.splits["validation"]) == 3
    assert named(source) == [("44", 6), ("55", 7), ("../66", 8), ("77", 9), ("33", 10)]


@pytest.mark.parametrize(
    "content, message",
    [
        ("videoid,name,duration\n1,a,b\n", "csv:1: no column 'page_dir'"),
        ('"video\nid",name\n1,a\n', r"csv:1: no column 'videoid' .*\(video id, name\)"),
        (WEBVID + '9,"open,1,1,PT,u\n', "csv:6: a quote opened here is not closed"),
        (WEBVID.encode() + b"9,caf\xe9,1,1,PT,u\n", "csv:6: byte 0xe9 is not UTF-8"),
        (WEBVID + '9,"a"b"c",1,1,PT,u\n', "csv:6: broken CSV"),
        ("", "csv:1: empty"),
    ],
)
def test_webvid_broken(tmp_path, content, message):
    put(tmp_path, results_2M_train__csv=content)
    with pytest.raises(UserError, match=message):
        sources.open_source("webvid/captions", tmp_path)


def test_webvid_holds_places_and_not_rows(tmp_path):
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(["videoid", "name", "page_idx", "page_dir", "duration", "contentUrl"])
    for i in range(2000):
        writer.writerow([i, f"caption, {i}", i, f"{i % 7:06d}", "PT", "u"])
    put(tmp_path, results_2M_train__csv=text.getvalue())
    found = sources.open_source("webvid/captions", tmp_path).splits["train"]
    assert isinstance(found, webvid.Rows) and len(found) == 2000
    assert list(found[1234].texts) == ["caption, 1234"]
    assert len(pickle.dumps(found)) < 2000 * 20
    part = found[500:1500]  # a shard's, places too
    assert len(part) == 1000 and part[34].texts == ["caption, 534"]
    assert len(pickle.dumps(part)) < 1000 * 20
    assert [e.video_id for e in part[998:]] == ["1498", "1499"]


# --- MSR-VTT -------------------------------------------------------------------------------------


def msrvtt_data(*numbers):
    sentences = [
        {"caption": f"caption {j} of {n}", "video_id": f"video{n}", "sen_id": 1000 * n - j}
        for n in numbers
        for j in range(3)
    ]
    videos = [{"video_id": f"video{n}", "split": "train"} for n in numbers]
    return {"info": {}, "videos": videos, "sentences": sentences}


def test_msrvtt_captioning_splits_by_number(tmp_path):
    numbers = (0, 6512, 6513, 7009, 7010, 9999)
    put(tmp_path, annotation___MSRVTT_data__json=msrvtt_data(*numbers))
    put(tmp_path, videos___all___video6512__mp4=b"x")
    source = sources.open_source("msrvtt/captioning", tmp_path)
    assert {s: [e.video_id for e in v] for s, v in source.splits.items()} == {
        "train": ["video0", "video6512"],
        "validation": ["video6513", "video7009"],
        "test": ["video7010", "video9999"],
    }
    one = source.splits["train"][1]
    assert list(one.texts) == [f"caption {j} of 6512" for j in (2, 1, 0)]  # by sen_id
    assert one.video_path == str(tmp_path / "videos/all/video6512.mp4")
    counted = [msrvtt.split_of(i) for i in range(10000)]
    assert {s: counted.count(s) for s in set(counted)} == sources.EXPECTED["msrvtt/captioning"]


def test_msrvtt_retrieval(tmp_path):
    put(
        tmp_path,
        MSRVTT_data__json=msrvtt_data(1, 2, 7010, 7020),
        MSRVTT_train__9k__csv="video_id\nvideo1\nvideo2\nvideo7010\nvideo2\nvideo5\nodd\n",
        MSRVTT_train__7k__csv="video_id\nvideo1\nvideo2\n",
        MSRVTT_JSFUSION_test__csv="key,vid_key,video_id,sentence\n"
        'ret0,msr7020,video7020,"a person, cooking"\n',
    )
    source = sources.open_source("msrvtt/retrieval", tmp_path)
    found = {s: [e.video_id for e in v] for s, v in source.splits.items()}
    assert found == {
        "train": ["video1", "video2", "video7010"],
        "train_7k": ["video1", "video2"],
        "test": ["video7020"],
    }
    assert list(source.splits["test"][0].texts) == ["a person, cooking"]
    assert len(source.splits["train"][0].texts) == 3
    assert named(source) == [("video2", 5), ("video5", 6), ("odd", 7)]


QA = [
    {"category_id": 1, "video_id": 5, "question": "what is it?", "id": 1, "answer": "Cat"},
    {"category_id": 1, "video_id": 9, "question": "who?", "id": 2, "answer": "man"},
    {"category_id": 1, "video_id": 5, "question": "doing what?", "id": 3, "answer": "sleep"},
]


@pytest.mark.parametrize("form", ["json", "jsonl"])
def test_msrvtt_qa_in_both_forms(tmp_path, form):
    if form == "json":
        put(tmp_path, train_qa__json=QA)
    else:
        lines = [{**q, "video_id": f"video{q['video_id']}", "answer_type": "x"} for q in QA]
        put(tmp_path, train__jsonl="\n".join(map(json.dumps, lines)))
    source = sources.open_source("msrvtt/qa", tmp_path)
    found = [(e.video_id, list(e.texts), list(e.answers)) for e in source.splits["train"]]
    assert found == [
        ("video5", ["what is it?", "doing what?"], ["cat", "sleep"]),
        ("video9", ["who?"], ["man"]),
    ]


def test_msrvtt_qa_names_bad_questions(tmp_path):
    bad = [{"video_id": 1}, {"video_id": "x", "question": "q", "answer": "a"}, 7]
    bad += [{"video_id": 1, "question": "q", "answer": ""}, {"video_id": True}]
    put(tmp_path, val_qa__json=QA + bad)
    source = sources.open_source("msrvtt/qa", tmp_path)
    assert [s.line for s in source.skipped] == [4, 5, 6, 7, 8]
    assert "no field 'question'" in str(source.skipped[0])


@pytest.mark.parametrize("form", ["jsonl", "json"])
def test_msrvtt_multiple_choice_in_both_forms(tmp_path, form):
    options = [f"option {i}" for i in range(5)]
    if form == "jsonl":
        row = {"clip_name": "video7010", "options": options, "answer": 3}
        put(tmp_path, mc___test__jsonl=json.dumps(row))
    else:
        put(tmp_path, MSR_MC_test__json=[{"video": "video7010", "caption": options, "answer": 3}])
    source = sources.open_source("msrvtt/multiple_choice", tmp_path)
    (entry,) = source.splits["test"]
    assert (entry.video_id, list(entry.texts), list(entry.answers)) == ("video7010", options, ["3"])


def test_msrvtt_multiple_choice_names_bad_items(tmp_path):
    good = {"clip_name": "video1", "options": list("abcde"), "answer": 0}
    lines = [good]
    lines += [good | {"options": list("abcd")}, good | {"answer": 5}, good | {"answer": "0"}]
    lines += [good | {"clip_name": "../1"}, good | {"options": ["", *"bcde"]}, {"answer": 1}]
    put(tmp_path, msrvtt_mc_test__jsonl="\n".join(map(json.dumps, lines)))
    source = sources.open_source("msrvtt/multiple_choice", tmp_path)
    assert [s.line for s in source.skipped] == [2, 3, 4, 5, 6, 7]
    assert len(source.splits["test"]) == 1


@pytest.mark.parametrize(
    "content, message",
    [
        (
            b'{"videos": [], "sentences": [{"caption": "a b',
            r"json:1: not JSON at column \d+: .*cut short",
        ),
        (b"[]", "holds list, not an object"),
        (b"{}", "no field 'sentences'"),
        (b'{"sentences": {}}', "field 'sentences': {} is no list"),
        (b"[" * 100_000, "not JSON that can be read|not JSON"),
        (b'{"sentences": []}', "no usable entry"),
        (b"\xff\xfe{", "UTF-16"),
    ],
)
def test_msrvtt_broken(tmp_path, content, message):
    put(tmp_path, MSRVTT_data__json=content)
    with pytest.raises(UserError, match=message):
        sources.open_source("msrvtt/captioning", tmp_path)


def test_two_annotation_files_of_one_name_are_refused(tmp_path):
    put(tmp_path, a___MSRVTT_data__json={}, b___MSRVTT_data__json={})
    with pytest.raises(UserError, match=r"two files MSRVTT_data\.json: .*; keep one"):
        sources.open_source("msrvtt/captioning", tmp_path)


@pytest.mark.parametrize("name", sources.NAMES)
def test_an_empty_directory_says_what_it_lacks(tmp_path, name):
    with pytest.raises(UserError, match=r": no .*\.(csv|json|jsonl|txt|pkl)\b"):
        sources.open_source(name, tmp_path)


# --- MSVD ----------------------------------------------------------------------------------------

NAMES = ["-4wsuPCjDBc_5_15", "vid_b_0_9", "no caption_1_2"]


def msvd_lists(tmp_path):
    put(
        tmp_path, train_list__txt=f"{NAMES[0]}\n\n{NAMES[0]}\n{NAMES[2]}\n", test_list__txt=NAMES[1]
    )


CAPTIONS = {
    NAMES[0]: [["a", "squirrel", "eats"], ["it", "eats", "a", "nut"]],
    NAMES[1]: [["a", "man", "runs"]],
}


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_msvd_captions_from_a_pickle(tmp_path, protocol):
    msvd_lists(tmp_path)
    put(tmp_path, raw_captions__pkl=b"")
    (tmp_path / "raw_captions.pkl").rename(tmp_path / "raw-captions.pkl")
    (tmp_path / "raw-captions.pkl").write_bytes(pickle.dumps(CAPTIONS, protocol))
    for name in ("msvd/captioning", "msvd/retrieval"):
        source = sources.open_source(name, tmp_path)
        assert rows(source) == {
            "train": [(NAMES[0], ["a squirrel eats", "it eats a nut"])],
            "test": [(NAMES[1], ["a man runs"])],
        }
        assert named(source) == [(NAMES[0], 3), (NAMES[2], 4)]


def test_msvd_captions_from_text(tmp_path):
    msvd_lists(tmp_path)
    put(
        tmp_path,
        AllVideoDescriptions__txt=f"# header\n{NAMES[0]} a squirrel eats\n{NAMES[1]} runs\n\n",
    )
    put(tmp_path, **{f"YouTubeClips___{NAMES[1]}__avi": b"x"})
    source = sources.open_source("msvd/captioning", tmp_path)
    assert rows(source)["test"] == [(NAMES[1], ["runs"])]
    assert source.splits["test"][0].video_path.endswith(f"YouTubeClips/{NAMES[1]}.avi")


def test_msvd_qa_through_the_mapping(tmp_path):
    put(tmp_path, youtube_mapping__txt=f"{NAMES[0]} vid5\n{NAMES[1]} vid9\nodd line here\n")
    put(tmp_path, train_qa__json=QA, test_qa__json=[QA[0] | {"video_id": 1971}, QA[0]])
    source = sources.open_source("msvd/qa", tmp_path)
    assert [e.video_id for e in source.splits["train"]] == NAMES[:2]
    assert [s.line for s in source.skipped] == [3, 1]
    assert "vid1971 is not in youtube_mapping.txt" in str(source.skipped[1])


class Runs:
    """Unpickled carelessly, it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (self.path, "w"))


def hostile_pickles(target):
    path = str(target)
    yield pickle.dumps({"v": [Runs(path)]})
    yield pickle.dumps({"v": [Runs(path)]}, 0)
    yield b"cos\nsystem\n(S'touch " + path.encode() + b"'\ntR."  # the textbook one
    yield b"\x80\x04\x8c\x08builtins\x8c\x04exec\x93\x8c\x04pass\x85R."  # names from the stack
    yield b"(S'touch " + path.encode() + b"'\nios\nsystem\n."  # INST
    yield b"\x80\x02cbuiltins\ndict\n)\x81."  # NEWOBJ
    yield b"\x80\x02\x82\x01."  # an extension's code
    yield b"\x80\x02U\x01aQ."  # a persistent id
    yield b"\x80\x02}r\xff\xff\xff\x7f."  # asks for sixteen gigabytes of memo
    yield b"\x80\x05\x97."  # a buffer from outside


def test_a_pickle_runs_nothing(tmp_path):
    target = tmp_path / "ran"
    for data in hostile_pickles(target):
        path = tmp_path / "raw-captions.pkl"
        path.write_bytes(data)
        with pytest.raises(
            UserError, match=r"raw-captions\.pkl: (a pickle that is not read|not a pickle)"
        ):
            msvd.load_plain_pickle(path)
        assert not target.exists()
    with pytest.raises(UserError, match="it wants to run"):
        path.write_bytes(next(hostile_pickles(target)))
        msvd.load_plain_pickle(path)


def test_the_lock_holds_without_the_look_before(tmp_path, monkeypatch):
    monkeypatch.setattr(msvd, "_refuse_code", lambda data: None)
    target = tmp_path / "ran"
    for data in list(hostile_pickles(target))[:8]:
        path = tmp_path / "raw-captions.pkl"
        path.write_bytes(data)
        with pytest.raises(UserError):
            msvd.load_plain_pickle(path)
        assert not target.exists()


def test_only_opcodes_of_plain_values_are_known():
    every = {o.name for o in pickletools.opcodes}
    assert every >= msvd._PLAIN_OPCODES
    assert not msvd._PLAIN_OPCODES & {
        "GLOBAL", "STACK_GLOBAL", "REDUCE", "BUILD", "INST", "OBJ", "NEWOBJ", "NEWOBJ_EX",
        "EXT1", "EXT2", "EXT4", "PERSID", "BINPERSID",
    }  # fmt: skip


def test_msvd_odd_pickles(tmp_path):
    msvd_lists(tmp_path)
    path = tmp_path / "raw-captions.pkl"
    doubling = []
    for _ in range(60):
        doubling = [doubling, doubling]
    odd = {NAMES[0]: [["fine"], doubling, [1], "as text"], NAMES[1]: 7, 5: []}
    path.write_bytes(pickle.dumps(odd))
    source = sources.open_source("msvd/captioning", tmp_path)
    assert rows(source) == {"train": [(NAMES[0], ["fine", "as text"])]}
    for data, words in (
        (pickle.dumps([1]), "holds list"),
        (pickle.dumps(CAPTIONS)[:-9], "not a pickle|a pickle that is not read"),
        (b"", "not a pickle"),
        (b"\xff" * 50, "not a pickle"),
    ):
        path.write_bytes(data)
        with pytest.raises(UserError, match=words):
            sources.open_source("msvd/captioning", tmp_path)


# --- LSMDC and DiDeMo ----------------------------------------------------------------------------


def test_lsmdc(tmp_path):
    clip = "0001_American_Beauty_00.00.51.926-00.00.54.129"
    line = f"{clip}\t00.00.51.926\t00.00.54.129\t00.00.51.900\t00.00.54.200\t"
    put(
        tmp_path,
        LSMDC16_annos_training__csv=f'{line}SOMEONE lies, "quoted\n{line}Again\nshort\trow\n',
        LSMDC16_challenge_1000_publictect__csv=f"{line}It shines.\r\n",
    )
    source = sources.open_source("lsmdc/retrieval", tmp_path)
    assert rows(source) == {
        "train": [(clip, ['SOMEONE lies, "quoted', "Again"])],
        "test": [(clip, ["It shines."])],
    }
    assert named(source) == [("short", 3)]
    assert (source.splits["test"][0].start, source.splits["test"][0].end) == (None, None)


def test_didemo_joins_descriptions_and_takes_30_seconds(tmp_path):
    video = "54322086@N00_2408598493_274c77d26a.avi"
    row = {"annotation_id": 1, "video": video, "times": [[0, 0]]}
    put(
        tmp_path,
        test_data__json=[
            row | {"description": "a dog runs."},
            row | {"description": "it stops"},
            row,
        ],
    )
    (tmp_path / "videos").mkdir()
    moved = tmp_path / "videos" / video.replace(".avi", ".mp4")
    moved.write_bytes(b"x")
    source = sources.open_source("didemo/retrieval", tmp_path)
    (entry,) = source.splits["test"]
    assert (entry.video_id, list(entry.texts)) == (video, ["a dog runs. it stops"])
    assert (entry.start, entry.end, entry.video_path) == (None, 30.0, str(moved))
    assert named(source) == [(video, 3)]


# --- helpers -------------------------------------------------------------------------------------


def test_clean_keeps_words_and_single_spaces():
    assert entries.clean("  a \n b\u2028c\x85d ") == "a b c d"
    assert entries.clean("plain") == "plain"
    assert len(entries.shown("x" * 1000)) <= 60


def test_times_of_rows():
    assert files.seconds("", "start") is None
    assert files.seconds("1.5", "start") == 1.5
    for bad in ("-1", "nan", "inf", "x", [], 10**400):
        with pytest.raises(entries.RowError, match="field 'start'"):
            files.seconds(bad, "start")
