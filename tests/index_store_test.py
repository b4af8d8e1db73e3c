"""The flat store against a plain list of rows, under any order of changes."""

import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from stoa_jax.errors import UserError
from stoa_jax.index import exact, scan
from stoa_jax.index.flat import FlatStore
from stoa_jax.index.manifest import Settings
from stoa_jax.index.rows import Row, Rows

IDS = [
    "",
    "a",
    "b",
    "é",
    "e\u0301",
    "𝔘",
    "\udcff",
    "\uffff",
    "日本",
    "a\nb",
    "a\0",
    "z" * 300,
    "🎥",
]
DIM = 16


def brute_force(rows: list[tuple[Row, np.ndarray]], query: np.ndarray, k: int):
    """Every row scored in float64, sorted by score, id and start."""
    scores = [
        np.float32((vector.astype(np.float64) * query.astype(np.float64)).sum())
        for _, vector in rows
    ]
    order = sorted(range(len(rows)), key=lambda i: (-scores[i], rows[i][0].order))[:k]
    return [rows[i][0] for i in order], [scores[i] for i in order]


def check_search(store: FlatStore, rows: list, queries: np.ndarray, k: int) -> None:
    for query, found in zip(queries, store.search(queries.astype(np.float64), k), strict=True):
        wanted, scores = brute_force(rows, query, k)
        assert found.scores.tolist() == scores
        assert [Rows(found.rows)[i] for i in range(len(found.scores))] == wanted


@st.composite
def vectors(draw, count: int) -> np.ndarray:
    """Sample a few directions, moved by steps above and below the resolution of float16."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    base = np.random.default_rng(draw(st.integers(0, 2))).standard_normal(DIM)
    step = draw(st.sampled_from([0.0, 1e-9, 1e-7, 1e-5, 1e-3, 1.0]))
    length = draw(st.sampled_from([1.0, 1.0, 1.0, 1e-6, 300.0, 0.0]))
    out = base + step * rng.standard_normal((count, DIM))
    return (length * out / np.linalg.norm(out, axis=1, keepdims=True)).astype(np.float32)


class Changes(RuleBasedStateMachine):
    """Additions, deletions, compactions and merges; the store must equal a list."""

    def __init__(self):
        super().__init__()
        self.root = tempfile.TemporaryDirectory()
        self.rows: list[tuple[Row, np.ndarray]] = []
        self.others = 0

    @initialize()
    def create(self):
        self.directory = Path(self.root.name) / "index"
        self.store = FlatStore.create(self.directory, Settings(DIM))

    def _new(self, data, ids: list[str]) -> list[tuple[Row, np.ndarray]]:
        start = data.draw(st.sampled_from([None, 0.0, 0.5, 10.0]))
        end = None if start is None else start + 10
        new = [Row(i, f"/{i}.mp4", start, end) for i in ids]
        return list(zip(new, data.draw(vectors(len(ids))), strict=True))

    @rule(data=st.data(), ids=st.lists(st.sampled_from(IDS), min_size=1, max_size=6))
    def add(self, data, ids):
        new = self._new(data, ids)
        keys = [row.order for row, _ in self.rows + new]
        if len(set(keys)) < len(keys):
            with pytest.raises(UserError, match="same start"):
                append(self.store, new)
        else:
            append(self.store, new)
            self.rows += new

    @rule(ids=st.lists(st.sampled_from(IDS), min_size=1, max_size=3))
    def delete(self, ids):
        held = {row.id for row, _ in self.rows}
        if set(ids) <= held:
            gone = [row for row, _ in self.rows if row.id in ids]
            assert self.store.delete(ids) == len(gone)
            self.rows = [(row, vector) for row, vector in self.rows if row.id not in ids]
        else:
            with pytest.raises(UserError, match="no such id"):
                self.store.delete(ids)

    @rule()
    def compact(self):
        self.store.compact()
        assert len(self.store.snapshot.segments) <= 1

    @rule()
    def reopen(self):
        self.store = FlatStore(self.directory)

    @rule(data=st.data(), ids=st.lists(st.sampled_from(IDS), min_size=1, max_size=4, unique=True))
    def merge(self, data, ids):
        self.others += 1
        other = FlatStore.create(Path(self.root.name) / f"part{self.others}", Settings(DIM))
        new = self._new(data, ids)
        append(other, new)
        if {row.order for row, _ in new} & {row.order for row, _ in self.rows}:
            with pytest.raises(UserError, match="more than one"):
                self.store.merge([other])
        else:
            self.store.merge([other])
            self.rows += new

    @precondition(lambda self: self.rows)
    @rule(data=st.data(), k=st.integers(1, 12), count=st.sampled_from([1, 2, 9]))
    def search(self, data, k, count):
        check_search(self.store, self.rows, data.draw(vectors(count)), k)

    @invariant()
    def counts(self):
        if hasattr(self, "store"):
            assert len(self.store) == len(self.rows)
            assert self.store.ids() == list(dict.fromkeys(row.id for row, _ in self.rows))

    def teardown(self):
        self.root.cleanup()


def append(store: FlatStore, new: list[tuple[Row, np.ndarray]]) -> None:
    rows = [row for row, _ in new]
    columns = ([getattr(r, name) for r in rows] for name in ("id", "video", "start", "end"))
    store.append(Rows.of(*columns), np.stack([vector for _, vector in new]))


Changes.TestCase.settings = settings(
    max_examples=60,
    stateful_step_count=25,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
TestChanges = Changes.TestCase


def only(patch: pytest.MonkeyPatch, library: str) -> None:
    """Let the scan find no other library than this one."""
    if library != "numkong":
        patch.setattr(exact.scan, "half_kernel", lambda dim: None)
    if library == "numpy":
        patch.setattr(exact.scan, "half_lists", lambda dim: None)


def test_the_fastest_library_that_is_installed_scans(monkeypatch):
    assert scan.library(512) == "numkong"
    only(monkeypatch, "usearch")
    assert scan.library(512) == "usearch"
    assert scan.described(512).startswith("usearch 2.")
    only(monkeypatch, "numpy")
    assert scan.library(512) == "numpy"


@pytest.mark.parametrize("module", ["numkong", "usearch"])
def test_a_library_that_is_missing_or_inaccurate_does_not_scan(monkeypatch, module):
    found = {"numkong": scan.half_kernel, "usearch": scan.half_lists}[module].__wrapped__
    assert found(64) is not None
    with monkeypatch.context() as patch:
        patch.setattr(scan, "gamma", lambda dim: -1.0)
        assert found(64) is None
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setitem(sys.modules, f"{module}.index", None)
    assert found(64) is None


@pytest.mark.parametrize("kernel", ["numkong", "usearch", "numpy"])
@pytest.mark.parametrize("dim", [1, 3, 64, 512])
@given(seed=st.integers(0, 2**32 - 1), step=st.sampled_from([0.0, 1e-8, 1e-6, 3e-4, 1.0]))
@settings(max_examples=8, deadline=None)
def test_near_ties_are_told_apart(kernel, dim, seed, step):
    rng = np.random.default_rng(seed)
    base = rng.standard_normal(dim)
    found = base + step * rng.standard_normal((3000, dim))
    found = (found / np.linalg.norm(found, axis=1, keepdims=True)).astype(np.float32)
    rows = [(Row(f"{i % 1500}", None, float(i // 1500), None), v) for i, v in enumerate(found)]
    queries = np.stack([base, found[5], rng.standard_normal(dim)]).astype(np.float32)
    with tempfile.TemporaryDirectory() as root, pytest.MonkeyPatch.context() as patch:
        only(patch, kernel)
        assert scan.library(dim) == kernel
        store = FlatStore.create(Path(root) / "index", Settings(dim))
        append(store, rows[:2000])
        append(store, rows[2000:])
        for k in (1, 100):
            check_search(store, rows, queries, k)
        store.delete([f"{i}" for i in range(0, 1500, 2)])
        check_search(store, [row for row in rows if int(row[0].id) % 2], queries, 100)


@pytest.mark.parametrize("kernel", ["numkong", "usearch", "numpy"])
def test_one_long_vector_does_not_hide_short_ones(kernel, tmp_path, monkeypatch):
    only(monkeypatch, kernel)
    rng = np.random.default_rng(0)
    found = rng.standard_normal((500, DIM)).astype(np.float32)
    found[0] *= 1e6
    rows = [(Row(str(i), None, None, None), v) for i, v in enumerate(found)]
    store = FlatStore.create(tmp_path / "index", Settings(DIM))
    append(store, rows)
    check_search(store, rows, rng.standard_normal((3, DIM)).astype(np.float32), 20)


@pytest.mark.slow
def test_a_million_rows_with_odd_ids(tmp_path):
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((1_000_000, 8)).astype(np.float32)
    ids = [f"{IDS[i % len(IDS)]}{i}" for i in range(len(vectors))]
    store = FlatStore.create(tmp_path / "index", Settings(8))
    for first in range(0, len(ids), 250_000):
        part = slice(first, first + 250_000)
        store.append(Rows.of(ids[part], ids[part]), vectors[part])
    store = FlatStore(tmp_path / "index")
    assert len(store) == len(ids) and store.ids() == ids
    query = vectors[6].astype(np.float64)  # its id holds a lone surrogate
    best = np.argsort(-(vectors @ vectors[6]), kind="stable")[:5]
    (found,) = store.search(query[None], 5)
    assert found.ids == [ids[i] for i in best]
    gone = [ids[i] for i in best]
    assert store.delete(gone) == 5
    store.compact()
    assert len(store) == len(ids) - 5 and not store.videos_of(gone)


def test_many_small_adds_leave_few_segments_in_order(tmp_path):
    store = FlatStore.create(tmp_path / "index", Settings(DIM))
    rng = np.random.default_rng(0)
    rows = [(Row(str(i), None, None, None), rng.standard_normal(DIM)) for i in range(100)]
    for row in rows:
        append(store, [row])
    assert len(store.snapshot.segments) <= 7
    assert store.ids() == [str(i) for i in range(100)]
