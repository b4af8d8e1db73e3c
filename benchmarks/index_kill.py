"""Kill a writer with SIGKILL again and again, and check that what it committed is intact.

    python -m benchmarks.index_kill --kills=100

A child adds, deletes, compacts and merges in a loop, and logs each change before it starts and
after it returns. It is killed at a random moment. The index must then hold the rows of all changes
that returned, and those of the change in progress completely or not at all. A kill counts as inside
a commit if the writer's lock still names the child.
"""

import argparse
import collections
import json
import logging
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

import stoa_jax

DIM, ROWS = 64, 200
State = dict[str, int]  # id: the seed of its vector


def vector(seed: int) -> np.ndarray:
    """Return the vector that belongs to a seed."""
    return np.random.default_rng(seed).standard_normal(DIM).astype(np.float32)


def after(state: State, turn: int) -> tuple[str, State, list[str]]:
    """Return the kind of change made in a turn, the state after it, and the ids it touches."""
    kind = random.Random(turn).choice(["add", "add", "merge", "delete", "compact"])
    if kind in ("add", "merge"):
        new = {f"{turn}-{i}": turn * ROWS + i for i in range(ROWS)}
        return kind, {**state, **new}, list(new)
    if kind == "delete" and state:
        gone = random.Random(turn).sample(sorted(state), min(len(state), 3 * ROWS // 2))
        return kind, {i: s for i, s in state.items() if i not in set(gone)}, gone
    return "compact", state, []


def child(root: Path, turn: int) -> None:
    """Change the index in an endless loop, starting at the given turn."""
    index = stoa_jax.Index.open(root / "index")
    state = contents(index)
    while True:
        kind, new, ids = after(state, turn)
        note(root, turn, "begin", kind)
        vectors = [vector(new[i]) for i in ids] if kind in ("add", "merge") else []
        if kind == "add":
            index.add_vectors(np.stack(vectors), ids)
        elif kind == "merge":
            part = root / f"part{turn}"
            shutil.rmtree(part, ignore_errors=True)
            with stoa_jax.Index.create(part, dim=DIM) as one:
                one.add_vectors(np.stack(vectors), ids)
            index.close()
            index = stoa_jax.Index.merge(root / "index", [part])
            shutil.rmtree(part)
        elif kind == "delete":
            index.delete(ids)
        else:
            index.compact()
        note(root, turn, "end", kind)
        state, turn = new, turn + 1


def note(root: Path, turn: int, what: str, kind: str) -> None:
    """Add a line to the child's log."""
    with open(root / "log", "a") as log:
        log.write(f"{turn} {what} {kind}\n")


def contents(index: stoa_jax.Index) -> State:
    """Return the seed of each id's vector, after checking all vectors."""
    state = {i: int(i.split("-")[0]) * ROWS + int(i.split("-")[1]) for i in index.ids()}
    if state:
        ids, scores = index.search_vectors(np.ones((1, DIM)), k=len(index))
        wanted = np.array([vector(state[i]).sum(dtype=np.float64) for i in ids[0]])
        assert np.abs(scores[0] - wanted).max() < 1e-4, "a vector belongs to another id"
    return state


def main() -> None:
    """Run the child, kill it, check the index, and count."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--child", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--root", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    logging.disable()  # every writer reports the one that was killed before it
    if args.child is not None:
        child(args.root, args.child)
    chance = random.Random(args.seed)
    inside: collections.Counter[str] = collections.Counter()
    outside = committed = 0
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        stoa_jax.Index.create(root / "index", dim=DIM).close()
        state: State = {}
        turn = 0
        for kill in range(args.kills):
            (root / "log").write_text("")
            process = subprocess.Popen(
                [sys.executable, "-m", __spec__.name, f"--child={turn}", f"--root={root}"]
            )
            while not (root / "log").read_text():
                assert process.poll() is None, "the child did not start"
                time.sleep(0.005)
            time.sleep(chance.uniform(0, 0.5))
            process.kill()
            process.wait()
            lock = (root / "index" / "lock").read_bytes()
            holder = json.loads(lock or b"{}")
            lines = [line.split() for line in (root / "log").read_text().splitlines()]
            for number, what, _ in lines:
                if what == "end":
                    state = after(state, int(number))[1]
                    turn = int(number) + 1
            found = contents(stoa_jax.Index.open(root / "index"))
            under_way = lines[-1][1] == "begin"
            if found != state:
                _, new, _ = after(state, turn)
                assert under_way and found == new, f"kill {kill}: not what was committed"
                state, turn = new, turn + 1
                committed += 1
            if holder.get("pid") == process.pid:
                inside[holder["action"]] += 1
            else:
                outside += 1
    print(
        f"{args.kills} kills: {sum(inside.values())} inside a change "
        f"({', '.join(f'{kind} {count}' for kind, count in sorted(inside.items()))}; "
        f"{committed} of all kills came after its commit and before its return), {outside} between "
        f"changes; {turn} changes and {len(state)} rows at the end, none lost, none half"
    )


if __name__ == "__main__":
    main()
