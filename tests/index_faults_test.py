"""Killed writers, power cuts, full disks, two writers, readers beside a writer, damaged files."""

import errno
import json
import os
import re
import resource
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from stoa_jax.errors import UserError
from stoa_jax.index import manifest
from stoa_jax.index.flat import FlatStore
from stoa_jax.index.lock import writer_lock
from stoa_jax.index.manifest import Settings
from tests.support import index_deaths
from tests.support.index_deaths import append, rows_of

REPO = Path(__file__).resolve().parents[1]


@pytest.fixture
def root(tmp_path):
    index_deaths.create(tmp_path)
    return tmp_path


@pytest.mark.parametrize("change", index_deaths.CHANGES)
def test_killed_at_every_call(change):
    command = [sys.executable, "-m", "tests.support.index_deaths", change]
    run = subprocess.run(command, cwd=REPO, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    deaths, committed = map(int, run.stdout.split())
    assert deaths >= 30
    assert 0 < committed <= deaths


@pytest.mark.parametrize("change", index_deaths.CHANGES)
def test_all_is_synced_before_the_manifest_names_it(root, monkeypatch, change):
    """A power cut can lose files and directory entries that were not synced."""
    unsynced: set[str] = set()
    paths: dict[int, str] = {}
    real = {name: getattr(os, name) for name in ("open", "write", "fsync", "replace", "mkdir")}
    at_commit = []

    def opened(path, flags, *args, **kwargs):
        new = flags & os.O_CREAT and not os.path.exists(path)
        descriptor = real["open"](path, flags, *args, **kwargs)
        paths[descriptor] = str(path)
        if new:
            unsynced.update((str(path), str(Path(path).parent)))
        return descriptor

    def written(descriptor, data):
        unsynced.add(paths[descriptor])
        return real["write"](descriptor, data)

    def synced(descriptor):
        real["fsync"](descriptor)
        unsynced.discard(paths[descriptor])

    def made(path, *args):
        real["mkdir"](path, *args)
        unsynced.update((str(path), str(Path(path).parent)))

    def replaced(old, new):
        assert str(old) not in unsynced
        at_commit.append(unsynced - {str(Path(new).parent)})
        real["replace"](old, new)
        unsynced.add(str(Path(new).parent))

    for fake, name in ((opened, "open"), (written, "write"), (synced, "fsync")):
        monkeypatch.setattr(os, name, fake)
    monkeypatch.setattr(os, "mkdir", made)
    monkeypatch.setattr(os, "replace", replaced)
    index_deaths.CHANGES[change](root)
    assert at_commit == [set()]
    assert not unsynced


@pytest.mark.parametrize("change", index_deaths.CHANGES)
def test_a_disk_that_fills_at_any_write_loses_nothing(root, monkeypatch, change):
    old = rows_of(FlatStore(root / "index"))
    write, limit = os.write, 0
    while True:
        count = 0

        def full(descriptor, data, limit=limit):
            nonlocal count
            count += 1
            if count > limit:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return write(descriptor, data)

        monkeypatch.setattr(os, "write", full)
        try:
            index_deaths.CHANGES[change](root)
            break
        except UserError as error:
            assert re.search(r"not committed.*No space left.*free some space", str(error))
        finally:
            monkeypatch.setattr(os, "write", write)
        assert rows_of(FlatStore(root / "index")) == old
        names = {e.name for e in manifest.read(root / "index").segments}
        assert set(os.listdir(root / "index" / "segments")) == names
        limit += 1
    assert limit >= 1


def test_a_real_limit_on_file_size(root):
    child = os.fork()
    if not child:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        try:
            append(FlatStore(root / "index"), [f"n{i}" for i in range(10_000)], 0)
        except UserError as error:
            os._exit(0 if "File too large" in str(error) else 1)
        os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    store = FlatStore(root / "index")
    assert sorted(rows_of(store)) == ["a", "c", "d"]
    append(store, ["e"], 1)
    assert len(os.listdir(root / "index" / "segments")) == len(store.snapshot.segments)


def held_by_another(root: Path) -> subprocess.Popen:
    """Return a process that holds the writer's lock until its input ends."""
    code = (
        "import sys; from pathlib import Path; from stoa_jax.index.lock import writer_lock\n"
        "with writer_lock(Path(sys.argv[1]), 'add'): print('held', flush=True); sys.stdin.read()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(root / "index")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=REPO,
    )
    assert process.stdout and process.stdout.readline() == "held\n"
    return process


def test_the_second_of_two_writers_is_told_who_the_first_is(root):
    other = held_by_another(root)
    try:
        with (
            pytest.raises(UserError, match=rf"process {other.pid} on .* is writing.*\(add, since"),
            writer_lock(root / "index", "delete", wait=0.1),
        ):
            pass
        assert sorted(rows_of(FlatStore(root / "index"))) == ["a", "c", "d"]  # readers need no lock
    finally:
        other.communicate("")
    append(FlatStore(root / "index"), ["e"], 0)


def test_a_writer_waits_for_a_short_change(root):
    other = held_by_another(root)
    threading.Timer(0.3, other.stdin.close).start()
    append(FlatStore(root / "index"), ["e"], 0)
    assert other.wait() == 0


def test_the_lock_of_a_killed_writer_is_recognised(root, caplog):
    other = held_by_another(root)
    other.send_signal(signal.SIGKILL)
    other.wait()
    append(FlatStore(root / "index"), ["e"], 0)
    assert f"process {other.pid} on" in caplog.text and "was interrupted in add" in caplog.text
    caplog.clear()
    append(FlatStore(root / "index"), ["f"], 0)
    assert not caplog.text
    other.communicate()


def test_two_objects_of_one_process_take_turns(root):
    stores = [FlatStore(root / "index") for _ in range(2)]

    def write(which: int):
        for i in range(10):
            append(stores[which], [f"{which}-{i}"], i)

    threads = [threading.Thread(target=write, args=(which,)) for which in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(FlatStore(root / "index")) == 23


def test_a_reader_sees_one_state_while_a_writer_changes_it(tmp_path):
    """Every state that a reader opens is a committed one, and does not change while it is open."""
    directory = tmp_path / "index"
    FlatStore.create(directory, Settings(4))
    code = """
import sys
from pathlib import Path
from stoa_jax.index.flat import FlatStore
from tests.support.index_deaths import append
store = FlatStore(Path(sys.argv[1]))
for turn in range(25):
    append(store, [f"{turn}-{i}" for i in range(4)], turn)
    if turn % 3 == 2:
        store.delete([f"{turn - 1}-{i}" for i in range(4)])
    if turn % 4 == 3:
        store.compact()
"""
    writer = subprocess.Popen([sys.executable, "-c", code, str(directory)], cwd=REPO)
    query = np.random.default_rng(0).standard_normal((1, 4))
    seen, held = set(), []
    while writer.poll() is None:
        store = FlatStore(directory)
        assert len(store) % 4 == 0
        if len(store) not in seen:
            seen.add(len(store))
            held.append((store, rows_of(store), store.search(query, 5)[0].ids))
    assert writer.returncode == 0
    assert len(seen) > 3
    for store, rows, ids in held:
        assert rows_of(store) == rows
        assert store.search(query, 5)[0].ids == ids


@pytest.mark.parametrize("name", ["vectors.npy", "scan.npy", "rows.parquet"])
@pytest.mark.parametrize("size", [0, 10, -1])
def test_a_file_cut_short_is_named(root, name, size):
    segment = FlatStore(root / "index").snapshot.segments[0]
    path = root / "index" / "segments" / segment.entry.name / name
    os.truncate(path, size if size >= 0 else path.stat().st_size - 1)
    with pytest.raises(UserError, match=rf"{name}: \d+ bytes instead of \d+"):
        FlatStore(root / "index")


@pytest.mark.parametrize("name", ["vectors.npy", "scan.npy", "rows.parquet"])
def test_a_file_of_the_right_size_with_other_content(root, name):
    segment = FlatStore(root / "index").snapshot.segments[0]
    path = root / "index" / "segments" / segment.entry.name / name
    path.write_bytes(b"\1" * path.stat().st_size)
    with pytest.raises(UserError, match=rf"{name}: damaged"):
        FlatStore(root / "index")


def test_a_missing_segment_is_named(root):
    segment = FlatStore(root / "index").snapshot.segments[0]
    (root / "index" / "segments" / segment.entry.name / "scan.npy").unlink()
    with pytest.raises(UserError, match=r"scan\.npy: missing, but the manifest names it"):
        FlatStore(root / "index")


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"format": "other"}', b"\xff"])
def test_a_damaged_manifest(root, content):
    (root / "index" / "manifest.json").write_bytes(content)
    with pytest.raises(UserError, match=r"manifest\.json: damaged or truncated"):
        FlatStore(root / "index")


def test_an_index_of_another_version(root):
    path = root / "index" / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "version": 2}))
    with pytest.raises(UserError, match="format version 2; this stoa_jax reads version 1"):
        FlatStore(root / "index")


def test_no_index(tmp_path):
    with pytest.raises(UserError, match="no index here"):
        FlatStore(tmp_path)
    with pytest.raises(UserError, match="no index here"):
        FlatStore(tmp_path / "nowhere")
    (tmp_path / "mine.txt").write_text("x")
    with pytest.raises(UserError, match=r"not empty \(it holds 'mine.txt'\)"):
        FlatStore.create(tmp_path, Settings(4))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_directory_without_write_permission(root):
    os.chmod(root / "index", 0o500)
    with pytest.raises(UserError, match="cannot lock the index to write"):
        append(FlatStore(root / "index"), ["e"], 0)
