"""WebVid, LSMDC and DiDeMo as published, and properties of all sources."""

import csv
import io
import pickle

import pytest
from published_files import WEBVID, named, put, rows

from stoa_jax.data import sources
from stoa_jax.data.sources import entries, files, webvid
from stoa_jax.errors import UserError


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
    part = found[500:1500]  # a shard's slice; its offsets too
    assert len(part) == 1000 and part[34].texts == ["caption, 534"]
    assert len(pickle.dumps(part)) < 1000 * 20
    assert [e.video_id for e in part[998:]] == ["1498", "1499"]


@pytest.mark.parametrize("name", [d.name for d in sources.DATA_SETS.values() if d.read])
def test_an_empty_directory_says_what_it_lacks(tmp_path, name):
    with pytest.raises(UserError, match=r": no .*\.(csv|json|jsonl|txt|pkl)\b"):
        sources.open_source(name, tmp_path)


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
