"""Time the sides of a comparison in turn, so that other work on the machine affects all alike."""

import importlib.metadata
import importlib.util
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence

Sides = Mapping[str, Callable[[], object]]


def in_turn(sides: Sides, rounds: int, clock: Callable[[], float] = time.perf_counter):
    """Run every side once, then all in turn `rounds` times; return {side: median seconds}."""
    for run in sides.values():
        run()  # compiles, fills caches
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, run in sides.items():
            began = clock()
            run()
            times[name].append(clock() - began)
    return {name: statistics.median(seconds) for name, seconds in times.items()}


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print a Markdown table."""
    for row in (header, ["---"] * len(header), *rows):
        print("| " + " | ".join(map(str, row)) + " |", flush=True)


def environment(*packages: str) -> str:
    """Return cores and the versions of packages, for the caption of a table."""
    found = []
    for name in packages:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            found.append(f"no {name}")
    return f"{len(os.sched_getaffinity(0))} cores; {', '.join(found)}"


def installed(*packages: str) -> bool:
    """Return whether all these packages are installed."""
    return all(importlib.util.find_spec(name) is not None for name in packages)
