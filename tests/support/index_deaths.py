"""Kill a process while it changes an index, before and after every system call.

`python -m tests.support.index_deaths CHANGE` forks a child for each death and checks the result.
It prints the number of deaths, and exits with 1 and a line for the first wrong state.
"""

import contextlib
import functools
import logging
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from stoa_jax.index.flat import FlatStore
from stoa_jax.index.manifest import Settings
from stoa_jax.index.rows import Rows

DIM = 4
CALLS = ("open", "write", "fsync", "replace", "mkdir", "unlink", "rmdir", "ftruncate", "pwrite")


def rows_of(store: FlatStore) -> dict[str, bytes]:
    """Return {id: vector} of all live rows."""
    found = {}
    for segment in store.snapshot.segments:
        for position in segment.alive_positions():
            found[segment.rows[position].id] = segment.vectors[position].tobytes()
    return found


def append(store: FlatStore, ids: list[str], seed: int) -> None:
    vectors = np.random.default_rng(seed).standard_normal((len(ids), DIM)).astype(np.float32)
    store.append(Rows.of(ids, [f"/{i}.mp4" for i in ids]), vectors)


def create(root: Path) -> None:
    """Create four rows in two segments, one of them deleted, and a part to merge."""
    store = FlatStore.create(root / "index", Settings(DIM))
    append(store, ["a", "b", "c"], 0)
    append(store, ["d"], 1)
    store.delete(["b"])
    append(FlatStore.create(root / "part", Settings(DIM)), ["x", "y"], 2)


def add_one(root: Path) -> None:
    append(FlatStore(root / "index"), ["new"], 3)  # merges the last segment


def add_many(root: Path) -> None:
    append(FlatStore(root / "index"), [f"new{i}" for i in range(50)], 3)


def delete(root: Path) -> None:
    FlatStore(root / "index").delete(["a", "d"])


def compact(root: Path) -> None:
    FlatStore(root / "index").compact()


def merge(root: Path) -> None:
    FlatStore(root / "index").merge([FlatStore(root / "part")])


def set_threshold(root: Path) -> None:
    FlatStore(root / "index").set(threshold=0.5)


CHANGES: dict[str, Callable[[Path], None]] = {
    f.__name__: f for f in (add_one, add_many, delete, compact, merge, set_threshold)
}


def dying(change: Callable[[Path], None], root: Path, death: int, when: str) -> bool:
    """Run a change in a child that dies at its `death`-th call; return False if it survived."""
    child = os.fork()
    if not child:
        count = 0

        def deadly(name, call, *args, **kwargs):
            nonlocal count
            if name == "open" and not args[1] & os.O_CREAT:
                return call(*args, **kwargs)
            count += 1
            if count == death:
                if when == "half" and name == "write":
                    call(args[0], args[1][: len(args[1]) // 2])
                elif when == "after":
                    with contextlib.suppress(OSError):
                        call(*args, **kwargs)
                os._exit(9)
            return call(*args, **kwargs)

        for name in CALLS:
            setattr(os, name, functools.partial(deadly, name, getattr(os, name)))
        try:
            change(root)
        except BaseException as error:
            print(f"{change.__name__}: {error!r}", file=sys.stderr)
            os._exit(1)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code not in (0, 9):
        sys.exit(f"{change.__name__}: the child ended with {code}")
    return code == 9


def check(root: Path, old: dict, new: dict, where: str) -> bool:
    """Return whether the change was committed; the index must be whole and writable."""
    store = FlatStore(root / "index")
    found = rows_of(store)
    if found not in (old, new):
        sys.exit(f"{where}: {sorted(found)} is neither {sorted(old)} nor {sorted(new)}")
    append(store, ["after"], 4)
    if sorted(rows_of(FlatStore(root / "index"))) != sorted([*found, "after"]):
        sys.exit(f"{where}: the next writer finds {sorted(rows_of(store))}")
    named = {entry.name: set(entry.files) for entry in store.snapshot.manifest.segments}
    there = {p.name: set(os.listdir(p)) for p in (root / "index" / "segments").iterdir()}
    if there != named or list((root / "index").glob("*.tmp")):
        sys.exit(f"{where}: {there} is on disk and {named} in the manifest")
    return found == new


def main(name: str) -> None:
    logging.disable()  # each next writer reports the one that died
    change = CHANGES[name]
    with tempfile.TemporaryDirectory() as temporary:
        base = Path(temporary) / "base"
        base.mkdir()
        create(base)
        old = rows_of(FlatStore(base / "index"))
        done = Path(temporary) / "done"
        shutil.copytree(base, done)
        change(done)
        new = rows_of(FlatStore(done / "index"))
        deaths = committed = 0
        for when in ("before", "half", "after"):
            seen_new, death = False, 1
            while True:
                root = Path(temporary) / f"{when}{death}"
                shutil.copytree(base, root)
                died = dying(change, root, death, when)
                is_new = check(root, old, new, f"{name}, died {when} call {death}")
                if old != new and seen_new and not is_new:
                    sys.exit(f"{name}: committed, then not, at death {death} {when}")
                seen_new = is_new
                shutil.rmtree(root)
                if not died:
                    break
                deaths, committed, death = deaths + 1, committed + is_new, death + 1
    print(deaths, committed)


if __name__ == "__main__":
    main(sys.argv[1])
