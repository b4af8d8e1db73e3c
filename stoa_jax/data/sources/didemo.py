"""DiDeMo: paragraph retrieval. A video's descriptions are joined, and its first 30 s are used."""

from collections import defaultdict
from pathlib import PurePosixPath

from stoa_jax.data.sources.dataset import DataSet
from stoa_jax.data.sources.entries import Entry, RowError, SkippedRows, caption, file_name
from stoa_jax.data.sources.files import Files, field, read_rows
from stoa_jax.errors import UserError

SECONDS = 30.0
FILES = {"train": "train_data.json", "validation": "val_data.json", "test": "test_data.json"}


def read_retrieval(files: Files, skipped: SkippedRows) -> dict[str, list[Entry]]:
    """Return the splits whose files exist."""
    splits = {}
    for split, name in FILES.items():
        path = files.find(name)
        if path is None:
            continue
        paragraphs: dict[str, list[str]] = defaultdict(list)
        for number, row in read_rows(path, skipped):
            try:
                video = file_name(field(row, "video", str).strip(), "field 'video'")
                text = caption(field(row, "description", str), "description")
            except RowError as error:
                skipped.add(row.get("video"), error, path, number)
                continue
            paragraphs[video].append(text)
        splits[split] = [
            Entry(video, _path(files, video), [" ".join(texts)], (), None, SECONDS)
            for video, texts in paragraphs.items()
        ]
    if not splits:
        raise UserError(f"{files.root}: no {' or '.join(FILES.values())} in it, at any depth")
    return splits


def _path(files: Files, video: str) -> str:
    """Return a video's path; names carry the upload's suffix, and many copies have another one."""
    exact = files.named(video)
    return str(exact) if exact else files.video(PurePosixPath(video).stem)


DATA_SETS = (
    DataSet(
        "didemo/retrieval",
        read_retrieval,
        tasks=("retrieval",),
        clips={"train": 8395, "validation": 1065, "test": 1004},
    ),
)
