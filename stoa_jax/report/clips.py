"""The clips that a run was evaluated on, if its data set is available."""

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from stoa_jax.errors import UserError
from stoa_jax.report.run_files import Run

if TYPE_CHECKING:
    from stoa_jax.data.split import Split


class Clips:
    """Frames and true texts of the evaluated split, by the video's name."""

    def __init__(self, split: "Split"):
        self.split = split
        ids = [split.metadata(i).video_id for i in range(len(split))]
        # If a video has several clips, predictions also carry the index.
        names = ids if len(set(ids)) == len(ids) else [f"{name}#{i}" for i, name in enumerate(ids)]
        self.index: Mapping[str, int] = {
            **{name: i for i, name in reversed(list(enumerate(ids)))},
            **dict(zip(names, range(len(ids)), strict=True)),
        }

    def __len__(self) -> int:
        return len(self.split)

    def captions(self) -> dict[str, Sequence[str]]:
        """Return the texts of each clip."""
        return {name: self.split.metadata(i).texts for name, i in self.index.items()}

    def options(self) -> list[tuple[str, Sequence[str]]]:
        """Return (video, options) of each choice of a multiple-choice split, in order."""
        found = []
        for i in range(len(self.split)):
            about = self.split.metadata(i)
            size = len(about.texts) // max(1, len(about.answers))
            for j in range(len(about.answers)):
                found.append((about.video_id, about.texts[j * size : (j + 1) * size]))
        return found

    def frames(self, i: int) -> list[np.ndarray]:
        """Return the stored frames of clip `i`."""
        from stoa_jax.data.records import decode_jpeg

        return [decode_jpeg(jpeg) for jpeg in self.split.read(i)["frames"]]


def open_clips(run: Run) -> Clips | None:
    """Return the evaluated split of a run; add a note to the run and return None if unavailable."""
    data = run.config.get("data") or {}
    sets = data.get("sets") or []
    name = data.get("eval_set") or (sets[0][0] if sets else "")
    split_name = data.get("eval_split") or ""
    if not name or not split_name:
        return None
    for row in run.results:  # the split that was actually evaluated
        dataset, _, part = str(row.get("split", "")).partition(":")
        if dataset and part:
            name, split_name = dataset, part
    folder = data.get("dir") or os.environ.get("STOA_DATA", "data")
    try:
        from stoa_jax.data import pipeline

        split = pipeline.open_split(folder, name, split_name)
        hashes = {row.get("split_hash") for row in run.results} - {None}
        if hashes and split.fingerprint not in hashes:
            run.notes.append(
                f"{name}:{split_name} in {folder} is not the split that was evaluated "
                "(another fingerprint), so no frames are shown"
            )
            return None
        return Clips(split)
    except (UserError, ImportError, OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        run.notes.append(f"no frames and true texts are shown: {reason}")
        return None
