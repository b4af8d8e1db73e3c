"""MSR-VTT: captioning, retrieval (1k-A, trained on 9k or 7k), QA and multiple choice.

The captioning splits go by number, as published: video0 to video6512 for training, the next 497
for validation, 2,990 for the test. The retrieval test has one caption per video, from its list.
"""

import re
from collections import defaultdict
from collections.abc import Iterable

from stoa_jax.data.sources.dataset import DataSet
from stoa_jax.data.sources.entries import Entry, RowError, SkippedRows, caption, shown
from stoa_jax.data.sources.files import Files, field, read_csv, read_json, read_rows
from stoa_jax.errors import UserError

TRAIN, VALIDATION, ALL = 6513, 7010, 10000  # first number after the split
OPTIONS = 5
_VIDEO = re.compile(r"video([0-9]{1,6})")

ANNOTATIONS = ("MSRVTT_data.json", "videodatainfo.json", "train_val_videodatainfo.json")


def split_of(number: int) -> str:
    """Return the published split of video `number`."""
    if number < TRAIN:
        return "train"
    return "validation" if number < VALIDATION else "test"


def read_captioning(files: Files, skipped: SkippedRows) -> dict[str, list[Entry]]:
    """Return all captions of each video, by the published split."""
    splits: dict[str, list[Entry]] = {"train": [], "validation": [], "test": []}
    captions = _captions(files, skipped)
    for video in sorted(captions, key=_number):
        splits[split_of(_number(video))].append(_entry(files, video, captions[video]))
    return splits


def read_retrieval(files: Files, skipped: SkippedRows) -> dict[str, list[Entry]]:
    """Return the 9k list as "train", the 7k list as "train_7k", and 1k-A as "test"."""
    splits: dict[str, list[Entry]] = {}
    lists = {"train": "MSRVTT_train.9k.csv", "train_7k": "MSRVTT_train.7k.csv"}
    found = {split: path for split, name in lists.items() if (path := files.find(name))}
    if found:
        captions = _captions(files, skipped)
        for split, path in found.items():
            splits[split] = []
            for line, row in _listed(path, ("video_id",), skipped):
                video = row["video_id"].strip()
                if video in captions:
                    splits[split].append(_entry(files, video, captions[video]))
                else:
                    skipped.add(video, "has no caption in the annotations", path, line)
    test = files.find("MSRVTT_JSFUSION_test.csv")
    if test is not None:
        splits["test"] = []
        for line, row in _listed(test, ("video_id", "sentence"), skipped):
            video = row["video_id"].strip()
            try:
                splits["test"].append(_entry(files, video, [caption(row["sentence"], "sentence")]))
            except RowError as error:
                skipped.add(video, error, test, line)
    if not splits:
        raise UserError(
            f"{files.root}: no MSRVTT_train.9k.csv, MSRVTT_train.7k.csv or "
            "MSRVTT_JSFUSION_test.csv in it, at any depth"
        )
    return splits


def read_qa(files: Files, skipped: SkippedRows) -> dict[str, list[Entry]]:
    """Return questions by video, from either published form."""
    return read_questions(files, skipped, _video_name)


def read_questions(files: Files, skipped: SkippedRows, name_of) -> dict[str, list[Entry]]:
    """Read `{train,val,test}_qa.json`, or the same as JSONL; `name_of(row)` is the video's name."""
    splits: dict[str, list[Entry]] = {}
    for split, part in {"train": "train", "validation": "val", "test": "test"}.items():
        names = [f"{part}_qa.json", f"{part}_qa.jsonl", f"{part}.jsonl", f"qa/{part}.jsonl"]
        path = files.find(*names)
        if path is None:
            continue
        pairs: dict[str, tuple[list[str], list[str]]] = defaultdict(lambda: ([], []))
        for line, row in read_rows(path, skipped):
            try:
                video = name_of(row)
                question = caption(field(row, "question", str), "question")
                answer = caption(field(row, "answer", str), "answer").lower()
            except RowError as error:
                skipped.add(row.get("video_id"), error, path, line)
                continue
            pairs[video][0].append(question)
            pairs[video][1].append(answer)
        splits[split] = [_entry(files, video, *texts) for video, texts in pairs.items()]
    if not splits:
        raise UserError(f"{files.root}: no train_qa.json, val_qa.json or test_qa.json in it")
    return splits


def read_multiple_choice(files: Files, skipped: SkippedRows) -> dict[str, list[Entry]]:
    """Return the test of 2,990 clips with five captions each, from either published form."""
    splits = {}
    for split, names in {
        "train": ("msrvtt_mc_train.jsonl", "mc_train.jsonl", "mc/train.jsonl"),
        "test": (
            "msrvtt_mc_test.jsonl",
            "msrvtt_mc_test.json",
            "MSR_MC_test.json",
            "MSRVTT_MC_test.json",
            "mc_test.jsonl",
            "mc_test.json",
            "mc/test.jsonl",
            "test.jsonl",
        ),
    }.items():
        path = files.find(*names)
        if path is None:
            continue
        items: dict[str, tuple[list[str], list[str]]] = defaultdict(lambda: ([], []))
        for line, row in read_rows(path, skipped):
            try:
                video, options, answer = _choice(row)
            except RowError as error:
                skipped.add(row.get("clip_name", row.get("video")), error, path, line)
                continue
            items[video][0].extend(options)
            items[video][1].append(str(answer))
        splits[split] = [_entry(files, video, *texts) for video, texts in items.items()]
    if not splits:
        raise UserError(
            f"{files.root}: no msrvtt_mc_test.jsonl or msrvtt_mc_test.json in it "
            "(clip_name, options, answer; or video, caption, answer)"
        )
    return splits


def _choice(row: dict) -> tuple[str, list[str], int]:
    name, texts = ("clip_name", "options") if "clip_name" in row else ("video", "caption")
    video = _stem(field(row, name, str))
    options = field(row, texts, list)
    if len(options) != OPTIONS:
        raise RowError(f"field {texts!r}: {len(options)} options, not {OPTIONS}")
    cleaned = [caption(o, f"field {texts!r}, option {i}") for i, o in enumerate(options)]
    answer = field(row, "answer", int)
    if not 0 <= answer < OPTIONS:
        raise RowError(f"field 'answer': {answer} is none of 0 to {OPTIONS - 1}")
    return video, cleaned, answer


def _captions(files: Files, skipped: SkippedRows) -> dict[str, list[str]]:
    """Return {video: captions} in the order of `sen_id`."""
    path = files.require(*ANNOTATIONS)
    paths = [path]
    # The challenge published the annotations in two files.
    if path.name == ANNOTATIONS[2] and (second := files.find("test_videodatainfo.json")):
        paths.append(second)
    found: dict[str, list[tuple[int, str]]] = defaultdict(list)
    for path in paths:
        data = read_json(path, dict)
        try:
            sentences = field(data, "sentences", list)
        except RowError as error:
            raise UserError(f"{path}: {error}") from None
        for number, row in enumerate(sentences, 1):
            if not isinstance(row, dict):
                skipped.add(None, f"sentence {number}: {shown(row)} is not an object", path, number)
                continue
            try:
                video = _stem(field(row, "video_id", str))
                order = row.get("sen_id", number)
                order = order if isinstance(order, int) else number
                text = caption(field(row, "caption", str))
            except RowError as error:
                skipped.add(row.get("video_id"), f"sentence {number}: {error}", path, number)
                continue
            found[video].append((order, text))
        for row in data.get("videos") or ():
            video = row.get("video_id") if isinstance(row, dict) else None
            if isinstance(video, str) and video not in found:
                skipped.add(video, "video without a caption", path, 0)
    return {video: [text for _, text in sorted(rows)] for video, rows in found.items()}


def _listed(path, columns: Iterable[str], skipped: SkippedRows):
    """Yield the rows of a list of videos, without repetitions."""
    seen = set()
    for line, row in read_csv(path, tuple(columns), skipped, lambda c: bool(_VIDEO.fullmatch(c))):
        try:
            video = _stem(row["video_id"].strip())
        except RowError as error:
            skipped.add(row["video_id"], error, path, line)
            continue
        if video in seen:
            skipped.add(video, "is in the list twice", path, line)
            continue
        seen.add(video)
        yield line, row | {"video_id": video}


def _stem(name: str) -> str:
    stem = name.strip().removesuffix(".mp4")
    if not _VIDEO.fullmatch(stem):
        raise RowError(f"{shown(name)} is not an MSR-VTT video (video0 to video{ALL - 1})")
    return stem


def _number(video: str) -> int:
    return int(video.removeprefix("video"))


def _video_name(row: dict) -> str:
    value = field(row, "video_id", (int, str))
    return _stem(value if isinstance(value, str) else f"video{value}")


def _entry(files: Files, video: str, texts: list[str], answers=()) -> Entry:
    return Entry(video, files.video(video), texts, list(answers))


_BY_NUMBER = {"train": 6513, "validation": 497, "test": 2990}
DATA_SETS = (
    DataSet(
        "msrvtt/captioning",
        read_captioning,
        tasks=("captioning",),
        clips=_BY_NUMBER,
        items={"train": 130260, "validation": 9940, "test": 59800},
    ),
    DataSet(
        "msrvtt/retrieval",
        read_retrieval,
        tasks=("retrieval",),
        # "9k" and "7k" are the usual names of lists with 9,000 and 7,010 videos.
        clips={"train": 9000, "train_7k": 7010, "test": 1000},
    ),
    DataSet(
        "msrvtt/qa",
        read_qa,
        tasks=("qa",),
        clips=_BY_NUMBER,
        items={"train": 158581, "validation": 12278, "test": 72821},
        answers=1500,
    ),
    DataSet(
        "msrvtt/multiple_choice",
        read_multiple_choice,
        tasks=("multiple_choice",),
        clips={"test": 2990},
    ),
)
