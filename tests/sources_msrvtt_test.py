"""MSR-VTT as published: splits, questions, options, and broken files."""

import json

import pytest
from published_files import QA, msrvtt_data, named, put

from stoa_jax.data import sources
from stoa_jax.data.sources import msrvtt
from stoa_jax.errors import UserError


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
    assert {s: counted.count(s) for s in set(counted)} == sources.DATA_SETS[
        "msrvtt/captioning"
    ].clips


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
        (b'{"sentences": {}}', "field 'sentences': {} is not a list"),
        (b"[" * 100_000, "unreadable JSON|not JSON"),
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


def test_a_missing_video_belongs_beside_the_others(tmp_path):
    put(tmp_path, MSRVTT_data__json=msrvtt_data(1, 2), clips___all___video1__mp4=b"x")
    paths = [e.video_path for e in captioning(tmp_path)]
    assert paths == [str(tmp_path / "clips" / "all" / f"video{n}.mp4") for n in (1, 2)]
    put(tmp_path, more___video9__mp4=b"x")
    assert captioning(tmp_path)[1].video_path == str(tmp_path / "videos" / "video2.mp4")


def captioning(root):
    return sources.open_source("msrvtt/captioning", root).splits["train"]
