"""MSVD (YouTubeClips): captioning and retrieval from the lists and captions, and MSVD-QA.

Unpickling a file can run code, and `raw-captions.pkl` comes from the internet. So the reader
accepts only containers, text and numbers, and refuses any name that the pickle wants to import.
"""

import io
import pickle
import pickletools
import re
from collections import defaultdict
from pathlib import Path

from stoa_jax.data.sources.dataset import DataSet
from stoa_jax.data.sources.entries import (
    Entry,
    RowError,
    SkippedRows,
    caption,
    clean,
    file_name,
    shown,
)
from stoa_jax.data.sources.files import Files, field, read_text
from stoa_jax.data.sources.msrvtt import read_questions
from stoa_jax.errors import UserError

_MAX_PICKLE = 256 * 2**20  # the published file has 9 MB
_MAX_WORDS = 20_000  # in a caption
_MAX_CAPTIONS = 5_000_000  # the published file has 80,827
_PLAIN_OPCODES = frozenset(
    "PROTO FRAME STOP MARK POP POP_MARK DUP NONE NEWTRUE NEWFALSE "
    "INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT "
    "STRING BINSTRING SHORT_BINSTRING BINBYTES SHORT_BINBYTES BINBYTES8 "
    "UNICODE BINUNICODE SHORT_BINUNICODE BINUNICODE8 "
    "EMPTY_LIST LIST APPEND APPENDS EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 "
    "EMPTY_DICT DICT SETITEM SETITEMS EMPTY_SET ADDITEMS FROZENSET "
    "PUT BINPUT LONG_BINPUT MEMOIZE GET BINGET LONG_BINGET".split()
)
LISTS = {"train": "train_list.txt", "validation": "val_list.txt", "test": "test_list.txt"}


def read_captions(files: Files, skipped: SkippedRows) -> dict[str, list[Entry]]:
    """Return all captions of each listed video, for captioning and for retrieval."""
    captions, origin = _captions(files, skipped)
    splits: dict[str, list[Entry]] = {}
    for split, name in LISTS.items():
        path = files.find(name)
        if path is None:
            continue
        splits[split] = []
        seen = set()
        for line, text in enumerate(read_text(path).splitlines(), 1):
            video = text.strip().removesuffix(".avi")
            if not video:
                continue
            try:
                file_name(video, "the video")
            except RowError as error:
                skipped.add(video, error, path, line)
                continue
            if video in seen:
                skipped.add(video, "is in the list twice", path, line)
            elif not captions.get(video):
                skipped.add(video, f"has no caption in {origin}", path, line)
            else:
                splits[split].append(Entry(video, files.video(video), captions[video]))
            seen.add(video)
    if not splits:
        raise UserError(f"{files.root}: no {', '.join(LISTS.values())} in it, at any depth")
    return splits


def read_qa(files: Files, skipped: SkippedRows) -> dict[str, list[Entry]]:
    """Read MSVD-QA; `youtube_mapping.txt` maps its numbers to names."""
    path = files.require("youtube_mapping.txt")
    names: dict[int, str] = {}
    for line, text in enumerate(read_text(path).splitlines(), 1):
        if not text.strip():
            continue
        match = re.fullmatch(r"(\S+)\s+vid([0-9]{1,9})", text.strip())
        if not match or match[1] != clean(match[1]) or "/" in match[1]:
            skipped.add(None, f"{shown(text)} is not `name vidN`", path, line)
        elif int(match[2]) in names:
            skipped.add(match[1], f"vid{match[2]} is here twice", path, line)
        else:
            names[int(match[2])] = match[1]

    def name_of(row: dict) -> str:
        value = field(row, "video_id", (int, str))
        if isinstance(value, str):
            match = re.fullmatch(r"(?:vid)?([0-9]{1,9})", value)
            if not match:
                raise RowError(f"field 'video_id': {shown(value)} is not the number of a video")
            value = int(match[1])
        if value not in names:
            raise RowError(f"field 'video_id': vid{value} is not in {path.name}")
        return names[value]

    return read_questions(files, skipped, name_of)


def _captions(files: Files, skipped: SkippedRows) -> tuple[dict[str, list[str]], str]:
    pickled = files.find("raw-captions.pkl")
    if pickled is not None:
        return _from_pickle(pickled, skipped), pickled.name
    path = files.require("AllVideoDescriptions.txt", "raw-captions.pkl")
    found: dict[str, list[str]] = defaultdict(list)
    for line, row in enumerate(read_text(path).splitlines(), 1):
        if not row.strip() or row.lstrip().startswith("#"):
            continue
        video, _, sentence = row.strip().partition(" ")
        try:
            text = caption(sentence)
        except RowError as error:
            skipped.add(video, error, path, line)
            continue
        found[video].append(text)
    return found, path.name


def _from_pickle(path: Path, skipped: SkippedRows) -> dict[str, list[str]]:
    data = load_plain_pickle(path)
    if not isinstance(data, dict):
        raise UserError(f"{path}: holds {type(data).__name__}, not {{video: [[word, …], …]}}")
    found: dict[str, list[str]] = {}
    total = sum(len(v) for v in data.values() if isinstance(v, list | tuple))
    if total > _MAX_CAPTIONS:
        raise UserError(f"{path}: {total} captions; at most {_MAX_CAPTIONS} are read")
    for video, sentences in data.items():
        if not isinstance(video, str) or not isinstance(sentences, list | tuple):
            skipped.add(video, f"{shown(sentences)} is not a list of captions", path, 0)
            continue
        found[video] = []
        for number, words in enumerate(sentences, 1):
            try:
                found[video].append(caption(_sentence(words)))
            except RowError as error:
                skipped.add(video, f"caption {number}: {error}", path, 0)
    return found


def _sentence(words: object) -> str:
    if isinstance(words, str):
        return words
    if isinstance(words, list | tuple) and len(words) > _MAX_WORDS:
        raise RowError(f"{len(words)} words; at most {_MAX_WORDS} are accepted")
    if isinstance(words, list | tuple) and all(isinstance(w, str) for w in words):
        return " ".join(words)
    raise RowError(f"{shown(words)} is not a list of words")


class _PlainUnpickler(pickle.Unpickler):
    """Unpickler of containers, text and numbers, as a second safeguard after `_refuse_code`."""

    def find_class(self, module: str, name: str):
        raise pickle.UnpicklingError(f"it wants to run {module}.{name}")

    def persistent_load(self, pid):
        raise pickle.UnpicklingError("it refers to objects outside the file")


def _refuse_code(data: bytes) -> None:
    """Raise UnpicklingError for any opcode but those of plain data, before any is executed."""
    count = 0
    for count, (opcode, argument, _) in enumerate(pickletools.genops(data), 1):
        if opcode.name not in _PLAIN_OPCODES:
            what = f" {argument}" if argument is not None else ""
            raise pickle.UnpicklingError(f"it wants to run {opcode.name}{shown(what)[1:-1]}")
        # The unpickler allocates memory up to this index.
        if opcode.name in ("PUT", "LONG_BINPUT") and isinstance(argument, int) and argument > count:
            raise pickle.UnpicklingError(f"it asks for memo index {argument}")


def load_plain_pickle(path: Path) -> object:
    """Load a pickle of plain values. Nothing that it names is imported or executed."""
    try:
        if path.stat().st_size > _MAX_PICKLE:
            raise UserError(f"{path}: {path.stat().st_size} bytes; captions are not that long")
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    try:
        _refuse_code(data)
        # Python 2 wrote the published file: its byte strings are text.
        return _PlainUnpickler(io.BytesIO(data), encoding="utf-8", errors="replace").load()
    except pickle.UnpicklingError as error:
        reason = f"a pickle that was refused ({error}); only plain data is accepted"
    except Exception as error:
        # A broken pickle can raise any exception.
        reason = f"not a pickle that can be read ({type(error).__name__}: {error})"
    raise UserError(f"{path}: {reason}")


_LISTED = {"train": 1200, "validation": 100, "test": 670}
DATA_SETS = (
    DataSet("msvd/captioning", read_captions, tasks=("captioning",), clips=_LISTED),
    DataSet("msvd/retrieval", read_captions, tasks=("retrieval",), clips=_LISTED),
    DataSet(
        "msvd/qa",
        read_qa,
        tasks=("qa",),
        clips={"train": 1200, "validation": 250, "test": 520},
        items={"train": 30933, "validation": 6415, "test": 13157},
        answers=2423,
    ),
)
