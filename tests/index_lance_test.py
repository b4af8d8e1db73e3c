"""The index over LanceDB: the same calls, and the same results without an approximate index."""

import numpy as np
import pytest
from clip_tiny import FOLDER

import stoa_jax
from stoa_jax.errors import UserError
from stoa_jax.index import lance

pytest.importorskip("lancedb")

ODD = ["a", "é", "\udcff", "'; DROP TABLE", "a\0b", "日本", "🎥", "", '"x"', "a\nb"]


@pytest.fixture
def index(tmp_path):
    return stoa_jax.Index.create(tmp_path / "lance", dim=16, backend="lance")


def unit_vectors(count: int, seed: int = 0, dim: int = 16) -> np.ndarray:
    vectors = np.random.default_rng(seed).standard_normal((count, dim)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def test_the_same_results_as_the_flat_store(index, tmp_path):
    flat = stoa_jax.Index.create(tmp_path / "flat", dim=16)
    vectors = unit_vectors(200)
    vectors[7] = vectors[3]
    ids = [ODD[i % len(ODD)] for i in range(200)]
    starts = [float(i // len(ODD)) for i in range(200)]
    for one in (index, flat):
        one.add_vectors(vectors[:120], ids[:120], starts[:120], fingerprint="m")
        one.add_vectors(vectors[120:], ids[120:], starts[120:], fingerprint="m")
        assert one.delete(["é", "'; DROP TABLE"]) == 40
        one.compact()
    assert len(index) == len(flat) == 160 and sorted(index.ids()) == sorted(flat.ids())
    for query in unit_vectors(10, seed=1):
        assert index.search(query, 20) == flat.search(query, 20)
    again = stoa_jax.Index.open(tmp_path / "lance")
    assert again.settings == flat.settings and len(again) == 160


def test_what_is_refused(index):
    index.add_vectors(unit_vectors(2), ["a", "b"], [0, 1], fingerprint="m")
    with pytest.raises(UserError, match="with the same start"):
        index.add_vectors(unit_vectors(1), ["b"], [1], fingerprint="m")
    with pytest.raises(UserError, match="holds vectors of model m"):
        index.add_vectors(unit_vectors(1), ["c"], fingerprint="other")
    with pytest.raises(UserError, match="no such id: 'c'; nothing was deleted"):
        index.delete(["a", "c"])
    with pytest.raises(UserError, match="already contains an index"):
        stoa_jax.Index.create(index._store.place, dim=16, backend="lance")
    assert len(index) == 2


def test_a_reader_keeps_its_version(index, tmp_path):
    index.add_vectors(unit_vectors(3), ["a", "b", "c"])
    reader = stoa_jax.Index.open(tmp_path / "lance")
    index.delete(["a"])
    index.add_vectors(unit_vectors(1, seed=5), ["d"])
    index.compact()
    assert sorted(reader.ids()) == ["a", "b", "c"] and sorted(index.ids()) == ["b", "c", "d"]
    reader.add_vectors(unit_vectors(1, seed=6), ["e"])
    assert sorted(reader.ids()) == ["b", "c", "d", "e"]


def test_flat_parts_move_to_lance_in_one_commit(tmp_path):
    vectors = unit_vectors(30)
    for part in range(2):
        with stoa_jax.Index.create(tmp_path / f"part{part}", dim=16) as one:
            ids = [str(i) for i in range(part, 30, 2)]
            one.add_vectors(vectors[part::2], ids, fingerprint="m")
    parts = [tmp_path / "part0", tmp_path / "part1"]
    moved = stoa_jax.Index.merge(tmp_path / "lance", parts, backend="lance")
    assert moved.search_vectors(vectors, k=1)[0] == [[str(i)] for i in range(30)]
    assert moved.settings.fingerprint == "m"
    with pytest.raises(UserError, match="in more than one of the indexes"):
        stoa_jax.Index.merge(tmp_path / "lance", parts[:1])
    with pytest.raises(UserError, match="only flat indexes merge into a flat index"):
        stoa_jax.Index.merge(tmp_path / "part0", [tmp_path / "lance"])


def test_an_approximate_index_finds_nearly_all(index, monkeypatch):
    monkeypatch.setattr(lance, "ANN_ROWS", 2000)
    centres = unit_vectors(50, seed=2)
    vectors = np.repeat(centres, 100, 0) + 0.05 * unit_vectors(5000, seed=3)
    index.add_vectors(vectors, [str(i) for i in range(5000)])
    exact = index._store.search(centres.astype(np.float64), 10)
    index.compact()
    found = index._store.search(centres.astype(np.float64), 10)
    near = [len({*a.ids} & {*b.ids}) / 10 for a, b in zip(exact, found, strict=True)]
    assert np.mean(near) > 0.9
    exhaustive = index._store.search(centres.astype(np.float64), 10, exhaustive=True)
    assert [one.ids for one in exhaustive] == [one.ids for one in exact]


def test_videos(tmp_path):
    model = stoa_jax.load(FOLDER)
    index = stoa_jax.Index.create(tmp_path / "lance", model, backend="lance")
    frames = np.random.default_rng(0).integers(0, 255, (3, 2, 20, 20, 3), np.uint8)
    assert index.add(list(frames)) == stoa_jax.Added(3, 0, 0)
    assert index.add(list(frames)) == stoa_jax.Added(0, 3, 0)
    hit = index.search(frames[1], k=1)[0]
    assert hit.id == stoa_jax.Index.open(tmp_path / "lance", model).ids()[1]
    assert hit.score == pytest.approx(1, abs=1e-5)
