"""Print and store results one by one, so that none is lost at a time limit."""

import datetime
import importlib.metadata
import json
import os
import platform
import threading
import time
from pathlib import Path
from typing import Any

import jax


class Results:
    """A JSON-lines file of results; the first line of a run describes the machine."""

    def __init__(self, path: str | Path, command: str):
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = threading.Lock()
        self._began = time.monotonic()
        self.add("run", command=command, **machine())

    def add(self, what: str, text: str = "", **values: Any) -> None:
        """Print a result as one line, and append it to the file at once."""
        seconds = round(time.monotonic() - self._began, 1)
        shown = text or ", ".join(f"{name} {value}" for name, value in values.items())
        with self._lock:
            print(f"[{seconds:6.1f} s] {what}: {shown}", flush=True)
            with self.path.open("a") as file:
                file.write(
                    json.dumps({"result": what, "at_s": seconds, "text": shown, **values}) + "\n"
                )
                file.flush()
                os.fsync(file.fileno())


def machine() -> dict[str, Any]:
    """Return the date, the hardware and the versions that a result depends on."""
    versions = {}
    for name in ("jax", "jaxlib", "flax", "optax", "torch"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "none"
    return {
        "date": datetime.date.today().isoformat(),
        "device": jax.devices()[0].device_kind,
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        **versions,
    }
