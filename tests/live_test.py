import functools
import subprocess
import sys

import numpy as np
import pytest

from stoa_jax import config
from stoa_jax.data import builders, pipeline
from stoa_jax.data.build import run as build
from stoa_jax.data.synthetic import live, parts_of_speech, stored
from stoa_jax.errors import UserError
from stoa_jax.tasks import make_task

WORLD = {"seed": 3, "size": 32, "siblings": 2, "max_objects": 3}
COUNTS = {"train": 12, "validation": 2, "test": 3}
FRAMES, OBJECTS = 4, 5
SPEC = pipeline.BatchSpec(
    frames=FRAMES, image_size=24, objects=OBJECTS, text_length=20, vocab_size=8192
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Build the same world."""
    directory = tmp_path_factory.mktemp("built")
    for kind in ("captions", "qa", "multiple_choice", "pictures"):
        build.build(
            f"synthetic/{kind}",
            directory,
            options={**WORLD, **COUNTS},
            settings=builders.Settings(FRAMES, OBJECTS, 32, tagger="none"),
            run=functools.partial(build.encode_parts, processes=1, progress=False),
        )
    return directory


def opened(kind, split="train", folder="", **options):
    world = {**WORLD, **COUNTS, **options}
    return live.open_split(f"synthetic/{kind}", split, world, FRAMES, OBJECTS, str(folder))


@pytest.mark.parametrize("kind", ["captions", "qa", "multiple_choice", "pictures"])
def test_a_live_split_equals_the_built_one(folder, kind):
    for split in COUNTS:
        ours, built = opened(kind, split), pipeline.open_split(folder, f"synthetic/{kind}", split)
        assert len(ours) == len(built) == COUNTS[split]
        assert ours.fingerprint == built.fingerprint
        assert ours.kind == built.kind
        assert ours.stored_size == built.stored_size
        assert (ours.frames, ours.objects) == (built.frames, built.objects)
        assert ours.class_names == built.class_names
        for i in range(len(ours)):
            assert ours.metadata(i) == built.metadata(i)
            mine, theirs = ours.read(i), built.read(i)
            assert list(mine["frames"]) == list(theirs["frames"])  # the same JPEG bytes
            for name in ("boxes", "classes", "scores", "tokens"):
                np.testing.assert_array_equal(mine[name], theirs[name], err_msg=name)


def test_batches_come_in_the_same_order(folder):
    def batches(split):
        loader = pipeline.Loader(split, SPEC, 5, seed=7)
        return [loader.batch(step) for step in range(6)]  # two epochs and a half

    built = pipeline.open_split(folder, "synthetic/captions", "train")
    for mine, theirs in zip(batches(opened("captions")), batches(built), strict=True):
        for name in set(mine) - {"tags"}:
            np.testing.assert_array_equal(mine[name], theirs[name], err_msg=name)


def test_every_epoch_is_a_permutation_and_mixtures_keep_their_weights():
    from stoa_jax.data.order import Examples, Order

    sets = [Examples(opened("captions"), False), Examples(opened("captions", "test"), False)]
    order = Order(sets[:1], [1.0], seed=1, train=True)
    epochs = [[order.slot(0, e * 12 + i).clip for i in range(12)] for e in range(3)]
    assert all(sorted(epoch) == list(range(12)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]

    order = Order(sets, [3.0, 1.0], seed=1, train=True)
    slots = [order.slot(0, i) for i in range(4000)]
    assert [p.which for p in slots].count(1) == 1000
    # no long run without the rarer set, and each set still goes through all of its clips
    rare = [i for i, p in enumerate(slots) if p.which == 1]
    assert max(np.diff(rare)) <= 5
    assert {p.clip for p in slots[:40] if p.which == 1} == {0, 1, 2}


def test_a_live_world_needs_no_reader_of_files():
    code = f"""
import sys
from stoa_jax.data import pipeline
from stoa_jax.data.synthetic import live
split = live.open_split("synthetic/qa", "train", {{**{WORLD}, **{COUNTS}}}, {FRAMES}, {OBJECTS})
spec = pipeline.BatchSpec("qa", {FRAMES}, 24, {OBJECTS}, 20, 8192, answers=("left",))
next(iter(pipeline.Loader(split, spec, 4)))
heavy = {{"grain", "tensorflow_datasets", "tensorflow", "spacy"}}
print(sorted(heavy & {{name.split(".")[0] for name in sys.modules}}))
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_parts_of_speech():
    def tagged(text):
        return {w.word: w.upos for w in parts_of_speech.words(text) if w.upos != "X"}

    assert tagged(
        "the big red star is turning in a circle while a ball crosses in front of it"
    ) == {
        "big": "ADJ",
        "red": "ADJ",
        "star": "NOUN",
        "turning": "VERB",
        "circle": "NOUN",
        "ball": "NOUN",
        "crosses": "VERB",
        "front": "NOUN",
    }
    assert tagged("how many crosses are there?") == {"crosses": "NOUN"}
    assert tagged("what circles around first?") == {"circles": "VERB"}
    assert tagged("what does the pink arrow do?") == {
        "pink": "ADJ",
        "arrow": "NOUN",
        "do": "VERB",
    }


def test_the_tagger_mostly_agrees_with_the_world():
    share, _ = parts_of_speech.agreement(clips=60)
    assert share > 0.9


@pytest.fixture
def stored_from_one_clip(monkeypatch):
    """Store splits of every size; small ones are otherwise not."""
    monkeypatch.setattr(live, "_ALONE", 0)
    live.drawn.cache_clear()
    yield
    live.drawn.cache_clear()


@pytest.mark.parametrize("kind", ["captions", "qa", "multiple_choice", "pictures"])
def test_a_stored_split_equals_the_rendered_one(kind, tmp_path, monkeypatch, stored_from_one_clip):
    rendered = list(opened(kind)._source)
    live.drawn.cache_clear()
    assert opened(kind, folder=tmp_path)._source == EqualRecords(rendered)  # writes the file
    live.drawn.cache_clear()
    monkeypatch.setattr(live, "draw_chunk", None)  # a second rendering would raise
    read = opened(kind, folder=tmp_path)
    assert read._source == EqualRecords(rendered)
    assert len(list(tmp_path.iterdir())) == 1


class EqualRecords:
    """Compares equal to records with the same values and types."""

    def __init__(self, records):
        self.records = records

    def __eq__(self, other):
        for mine, theirs in zip(self.records, other, strict=True):
            assert mine.keys() == theirs.keys()
            for name, value in mine.items():
                if isinstance(value, np.ndarray):
                    assert value.dtype == theirs[name].dtype
                    np.testing.assert_array_equal(value, theirs[name], err_msg=name)
                else:
                    assert value == theirs[name], name
        return True


def test_other_options_or_other_code_are_stored_in_another_file(tmp_path, monkeypatch):
    def name(**options):
        return opened("captions", folder=tmp_path, **options).stored_name

    assert name() == opened("qa", folder=tmp_path).stored_name  # kinds share one rendering
    names = {name(), name(seed=4), name(twins=1), name(train=13)}
    names.add(opened("pictures", folder=tmp_path).stored_name)
    code = tmp_path / "render.py"
    for text in ("a = 1", "a = 2"):
        code.write_text(text)
        monkeypatch.setattr(stored, "_CODE", (code,))
        names.add(name())
    assert len(names) == 7


def test_a_file_that_cannot_be_written_is_reported(tmp_path, capsys, stored_from_one_clip):
    folder = tmp_path / "file"
    folder.write_text("")  # where a directory should be
    assert len(opened("captions", folder=folder)._source) == COUNTS["train"]
    assert f"data.live_dir: {folder}/clips-" in capsys.readouterr().err


def test_a_broken_stored_file_is_named(tmp_path, stored_from_one_clip):
    len(opened("captions", folder=tmp_path)._source)
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:1000])
    live.drawn.cache_clear()
    with pytest.raises(UserError, match=f"{path.name}: cannot be read .* delete it"):
        len(opened("captions", folder=tmp_path)._source)


def test_mistakes_are_named():
    with pytest.raises(UserError, match="webvid/captions"):
        live.open_split("webvid/captions", "train", {**WORLD, **COUNTS}, 2, 2)
    with pytest.raises(UserError, match="no split 'dev'"):
        opened("captions", "dev")
    with pytest.raises(UserError, match=r"data\.workers"):
        loader = pipeline.Loader(opened("captions"), SPEC, 4, workers=1)
        next(iter(loader))


def test_a_task_opens_the_live_world():
    c = config.default("captioning", "tiny")
    c.data.live = True
    c.data.world.update({**WORLD, **COUNTS})
    split = make_task(c).open_split("synthetic/captions", "test")
    assert len(split) == 3 and split.frames == c.model.frames
