"""The public index over vectors: what is refused, what is returned, one line each."""

import subprocess
import sys

import numpy as np
import pytest

import stoa_jax
from stoa_jax.errors import UserError


@pytest.fixture
def index(tmp_path):
    return stoa_jax.Index.create(tmp_path / "index", dim=8)


def unit_vectors(count: int, dim: int = 8, seed: int = 0) -> np.ndarray:
    vectors = np.random.default_rng(seed).standard_normal((count, dim)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def test_vectors_come_back_in_order_of_score(index):
    vectors = unit_vectors(300)
    index.add_vectors(vectors, [f"v{i}" for i in range(300)])
    queries = unit_vectors(20, seed=1)
    ids, scores = index.search_vectors(queries, k=7)
    exact = vectors.astype(np.float64) @ queries.T.astype(np.float64)
    for row, query in enumerate(exact.T):
        best = np.argsort(-query)[:7]
        assert ids[row] == [f"v{i}" for i in best]
        np.testing.assert_allclose(scores[row], query[best], atol=1e-6)
    assert scores.dtype == np.float32 and scores.shape == (20, 7)


def test_hits_say_where_in_which_video(index):
    vectors = unit_vectors(3)
    index.add_vectors(vectors, ["a", "a", "b"], [0, 5, 0], [10, 15, None])
    assert index.videos() == {"a": None, "b": None}
    first = index.search(vectors[1], k=1)[0]
    assert (first.id, first.video, first.start, first.end) == ("a", None, 5.0, 15.0)
    assert first.probability is None and first.matched is None
    assert first.score == pytest.approx(1, abs=1e-6)
    assert index.ids() == ["a", "b"] and len(index) == 3
    assert index.delete(["a"]) == 2
    assert index.search(list(map(float, vectors[1])), k=5)[0].id == "b"


def test_equal_scores_are_ordered_by_id_then_start(index):
    vector = unit_vectors(1)
    starts = [5, 0, None, 2, 1]
    index.add_vectors(np.repeat(vector, 5, 0), ["b", "b", "b", "a", "é"], starts)
    hits = index.search(vector[0], k=4)
    assert [(hit.id, hit.start) for hit in hits] == [("a", 2), ("b", None), ("b", 0), ("b", 5)]


def test_fewer_rows_than_asked_for(index):
    ids, scores = index.search_vectors(unit_vectors(2), k=3)
    assert ids == [[], []] and scores.shape == (2, 0)
    assert index.search(unit_vectors(1)[0]) == []
    index.add_vectors(unit_vectors(2), ["a", "b"])
    ids, scores = index.search_vectors(unit_vectors(2), k=3)
    assert [len(i) for i in ids] == [2, 2] and scores.shape == (2, 2)


def test_a_reader_keeps_what_it_opened(index, tmp_path):
    index.add_vectors(unit_vectors(2), ["a", "b"])
    reader = stoa_jax.Index.open(tmp_path / "index")
    index.delete(["a"])
    index.add_vectors(unit_vectors(1), ["c"])
    index.compact()
    assert reader.ids() == ["a", "b"] and len(reader.search(unit_vectors(1)[0])) == 2
    assert index.ids() == ["b", "c"] == stoa_jax.Index.open(tmp_path / "index").ids()


def test_merge_is_one_index_of_all_parts(tmp_path):
    parts = []
    vectors = unit_vectors(30)
    for part in range(3):
        with stoa_jax.Index.create(tmp_path / f"part{part}", dim=8) as one:
            ids = [f"{i}" for i in range(part, 30, 3)]
            one.add_vectors(vectors[part::3], ids, fingerprint="m")
        parts.append(tmp_path / f"part{part}")
    merged = stoa_jax.Index.merge(tmp_path / "all", parts)
    assert sorted(merged.ids(), key=int) == [f"{i}" for i in range(30)]
    assert merged.search_vectors(vectors, k=1)[0] == [[f"{i}"] for i in range(30)]
    assert merged.settings.fingerprint == "m"
    again = stoa_jax.Index.create(tmp_path / "more", dim=8)
    again.add_vectors(vectors[:1], ["new"], fingerprint="m")
    assert len(stoa_jax.Index.merge(tmp_path / "more", parts[:1])) == 11
    assert len(stoa_jax.Index.open(tmp_path / "part0")) == 10


def test_merge_refuses_what_does_not_belong_together(tmp_path):
    def part(name, dim=8, fingerprint=None, **options):
        one = stoa_jax.Index.create(tmp_path / name, dim=dim, **options)
        one.add_vectors(unit_vectors(1, dim), [name[0]], fingerprint=fingerprint)
        return tmp_path / name

    a, b = part("a"), part("b")
    for parts, message in [
        ([a, a], "listed twice"),
        ([a, part("c", dim=4)], "its dim is 4; that of the merged index is 8"),
        ([a, part("d", segment=4.0, stride=4.0)], "its segment is 4.0"),
        ([a, part("e", fingerprint="other")], "of model other"),
        ([a, part("ab")], "'a': in more than one"),
        ([], "is empty"),
        ([a, tmp_path / "nowhere"], "no index here"),
    ]:
        with pytest.raises(UserError, match=message):
            stoa_jax.Index.merge(tmp_path / "all", parts)
    assert len(stoa_jax.Index.merge(tmp_path / "all", [a, b])) == 2
    with pytest.raises(UserError, match="is the target of the merge"):
        stoa_jax.Index.merge(a, [a])


@pytest.mark.parametrize(
    ("vectors", "message"),
    [
        (np.full((1, 8), np.nan), "vector of 'x': it holds NaN"),
        (np.full((1, 8), np.inf), "NaN, infinity"),
        (np.full((1, 8), 1e20), "values beyond 1e"),
        (np.zeros((1, 7)), r"shape \[1, 7\]; this index holds \[n, 8\]"),
        (np.zeros(8), r"shape \[8\]"),
        (np.zeros((2, 8)), "2 vectors and 1 ids"),
        ([["a"] * 8], "not an array of numbers"),
    ],
)
def test_vectors_that_are_refused(index, vectors, message):
    with pytest.raises(UserError, match=message):
        index.add_vectors(vectors, ["x"])
    assert len(index) == 0


def test_rows_that_are_refused(index):
    index.add_vectors(unit_vectors(1), ["a"], [1])
    for ids, starts, ends, message in [
        (["a"], [1], None, r"'a': already in .* with the same start \(1.0\); delete it first"),
        (["b", "b"], None, None, "'b': given twice"),
        ([3], None, None, r"ids\[0\]: 3 is not a string"),
        ("b", None, None, "pass a list of strings"),
        (["b"], [1, 2], None, "starts: 2 values for 1 ids"),
        (["b"], [float("inf")], None, r"starts\[0\]: inf is not a time"),
        (["b"], [3], [2], "it ends at 2 s, before its start 3"),
    ]:
        with pytest.raises(UserError, match=message):
            index.add_vectors(unit_vectors(len(ids)), ids, starts, ends)
    assert len(index) == 1


def test_queries_that_are_refused(index):
    index.add_vectors(unit_vectors(1), ["a"])
    for query, message in [
        (np.zeros(7), "width 8"),
        (np.full(8, np.nan), "query 0: it holds NaN"),
        ("a red ball", "a text query needs the model"),
        (b"", "a video query needs the model"),
    ]:
        with pytest.raises(UserError, match=message):
            index.search(query)
    for k in (0, -1, 1.5, True):
        with pytest.raises(UserError, match=r"^k: "):
            index.search(np.ones(8), k)
    with pytest.raises(UserError, match="rerank needs an index created with fusion=True"):
        index.search(np.ones(8), rerank=True)


def test_vectors_of_two_models_do_not_mix(index):
    index.add_vectors(unit_vectors(1), ["a"], fingerprint="one")
    assert index.settings.fingerprint == "one"
    for fingerprint in ("two", None):
        with pytest.raises(UserError, match="holds vectors of model one, and these are of"):
            index.add_vectors(unit_vectors(1), ["b"], fingerprint=fingerprint)
    index.add_vectors(unit_vectors(1), ["b"], fingerprint="one")


def test_named_vectors_do_not_join_nameless_ones(index):
    index.add_vectors(unit_vectors(1), ["a"])
    with pytest.raises(UserError, match="of an unnamed model"):
        index.add_vectors(unit_vectors(1), ["b"], fingerprint="one")


def test_settings_that_are_refused(tmp_path):
    for options, message in [
        ({}, "pass a model, or dim="),
        ({"dim": 0}, "dim=0"),
        ({"dim": 8, "segment": 0}, "segment: 0"),
        ({"dim": 8, "segment": "scenes"}, "segment: 'scenes'"),
        ({"dim": 8, "stride": 11}, "stride: 11"),
        ({"dim": 8, "backend": "faiss"}, "backend: 'faiss'"),
        ({"dim": 8, "fusion": True}, "fusion=True needs a model"),
    ]:
        with pytest.raises(UserError, match=message):
            stoa_jax.Index.create(tmp_path / "index", **options)
    stoa_jax.Index.create(tmp_path / "index", dim=8)
    with pytest.raises(UserError, match="already contains an index"):
        stoa_jax.Index.create(tmp_path / "index", dim=8)


def test_unknown_ids_are_not_deleted(index):
    index.add_vectors(unit_vectors(2), ["a", "b"])
    with pytest.raises(UserError, match=r"no such id: 'c', 'd', 'e' and 1 more; nothing was"):
        index.delete(["a", "c", "d", "e", "f"])
    assert len(index) == 2
    index.delete("a")
    with pytest.raises(UserError, match="no such id: 'a'"):
        index.delete(["a"])


def test_a_closed_index_says_so(index):
    index.close()
    for call in (index.ids, index.compact, lambda: len(index)):
        with pytest.raises(UserError, match="was closed"):
            call()


def test_importing_the_index_starts_no_jax():
    code = (
        "import sys, stoa_jax; assert not {'pyarrow', 'jax'} & set(sys.modules); stoa_jax.Index;"
        "assert 'jax' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
