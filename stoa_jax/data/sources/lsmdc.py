"""LSMDC: tab-separated annotations without a header, one clip and sentence per row.

Six columns: clip id, start and end as aligned, start and end as extracted, sentence. Clips are
distributed already cut, one file each, so the times are not used.
"""

from collections import defaultdict
from pathlib import Path

from stoa_jax.data.sources.dataset import DataSet
from stoa_jax.data.sources.entries import Entry, RowError, SkippedRows, caption, file_name
from stoa_jax.data.sources.files import Files, read_text
from stoa_jax.errors import UserError

FILES = {
    "train": "LSMDC16_annos_training.csv",
    "validation": "LSMDC16_annos_val.csv",
    "test": "LSMDC16_challenge_1000_publictect.csv",
}


def read_retrieval(files: Files, skipped: SkippedRows) -> dict[str, list[Entry]]:
    """Return the splits whose files exist."""
    splits = {}
    for split, name in FILES.items():
        # `publictect` is the published spelling; some copies correct it.
        path = files.find(name, name.replace("publictect", "publictest"))
        if path is not None:
            splits[split] = _read(files, path, skipped)
    if not splits:
        raise UserError(f"{files.root}: no {' or '.join(FILES.values())} in it, at any depth")
    return splits


def _read(files: Files, path: Path, skipped: SkippedRows) -> list[Entry]:
    sentences: dict[str, list[str]] = defaultdict(list)
    for line, text in enumerate(read_text(path).split("\n"), 1):
        if not text.strip():
            continue
        cells = text.rstrip("\r").split("\t")
        try:
            if len(cells) < 6:
                raise RowError(
                    f"{len(cells)} fields between tabs, not 6: clip, start and end (aligned), "
                    "start and end (extracted), sentence"
                )
            clip = file_name(cells[0].strip().removesuffix(".avi"), "field 1, the clip")
            sentence = caption(cells[5], "field 6, the sentence")
        except RowError as error:
            skipped.add(cells[0], error, path, line)
            continue
        sentences[clip].append(sentence)
    # A few clips of the training file have two sentences.
    return [Entry(clip, files.video(clip), texts) for clip, texts in sentences.items()]


DATA_SETS = (
    DataSet(
        "lsmdc/retrieval",
        read_retrieval,
        tasks=("retrieval",),
        clips={"train": 101046, "validation": 7408, "test": 1000},
    ),
)
