"""`stoa examples`: clips as files, in the layout of a folder of the user's own."""

import numpy as np
import pytest

from stoa_jax.cli import main
from stoa_jax.data import sources
from stoa_jax.data.synthetic import examples


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("examples") / "clips"
    assert main(["examples", str(folder), "--clips=5"]) == 0
    return folder


def test_the_folder_source_reads_them_with_their_detections(folder):
    detections = folder / examples.DETECTIONS
    source = sources.open_source("folder/captions", folder, detections=detections)
    train, validation = source.splits["train"], source.splits["validation"]
    assert (len(train), len(validation)) == (4, 1) and source.skipped == []
    assert validation[0].texts == examples.world().clip(3).captions
    clip = source.load(validation[0], frames=8, short_side=96, objects=6)
    assert len(clip.frames) == 8 and (clip.classes >= 0).any(1).mean() > 0.7
    assert np.isfinite(clip.scores).all()


def test_mistakes_are_one_line(folder, tmp_path, capsys):
    assert main(["examples", str(folder)]) == 2
    assert "clips: exists already; name a new directory" in capsys.readouterr().err
    assert main(["examples", str(tmp_path / "none"), "--clips=0"]) == 2
    assert "--clips=0: it must be at least 1" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()
