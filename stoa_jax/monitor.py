"""Monitoring of a run: stop signals, the stall watchdog, progress output and step timing."""

import faulthandler
import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

import jax
from jax.experimental import multihost_utils

STALLED = 3  # exit code after a stall, and when saving after SIGTERM took too long


class Preempted(Exception):
    """Raised on SIGTERM inside `Stopper.interruptible`, where no further step follows."""


class Stopper:
    """Handler of SIGTERM and Ctrl-C that lets all processes stop after the same step.

    With several processes the signal may reach only one of them. JAX's preemption service then
    agrees on a step that no process has passed yet.
    """

    def __init__(self, grace_seconds: float):
        self.grace_seconds = grace_seconds
        self.requested = False
        self._raise = False
        self._before: dict[int, Any] = {}
        self._timer: threading.Timer | None = None

    def __enter__(self) -> "Stopper":
        # With several processes, the preemption service's own SIGTERM handler must stay in place.
        kinds = (signal.SIGTERM, signal.SIGINT) if jax.process_count() == 1 else ()
        if threading.current_thread() is threading.main_thread():
            self._before = {kind: signal.signal(kind, self._handle) for kind in kinds}
        return self

    def __exit__(self, *_: Any) -> None:
        for kind, handler in self._before.items():
            signal.signal(kind, handler)
        if self._timer is not None:
            self._timer.cancel()

    def _handle(self, kind: int, _frame: Any) -> None:
        if self.requested and kind == signal.SIGINT:
            raise KeyboardInterrupt
        first, self.requested = not self.requested, True
        if first:
            say(f"{signal.Signals(kind).name}: saving, then stopping")
            self.start_grace()
        if self._raise:
            raise Preempted

    def start_grace(self) -> None:
        """Abort the process if it has not saved and exited `grace_seconds` from now."""

        def too_late() -> None:
            give_up(f"not saved within faults.grace_seconds={self.grace_seconds:g} of SIGTERM")

        self._timer = threading.Timer(self.grace_seconds, too_late)
        self._timer.daemon = True
        self._timer.start()

    def should_stop(self, step: int) -> bool:
        """Return whether all processes stop after this step; call it after every step."""
        if jax.process_count() == 1:
            return self.requested
        if not multihost_utils.reached_preemption_sync_point(step):
            return False
        self.start_grace()
        return True

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """Raise `Preempted` inside the block as soon as a stop signal arrives."""
        self._raise = True
        try:
            if self.requested:
                raise Preempted
            yield
        finally:
            self._raise = False


class Watchdog:
    """Thread that dumps all stacks and aborts the process when `beat` is overdue."""

    def __init__(self, seconds: float, folder: str | Path):
        self.seconds = seconds
        self._path = Path(folder) / f"stacks-{jax.process_index()}.txt"
        self._what, self._limit, self._last = "starting", seconds, time.monotonic()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> "Watchdog":
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._done.set()
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()

    def beat(self, what: str, patience: float = 1.0) -> None:
        """Report progress; `what` happens next and may take `patience` times the limit."""
        self._what, self._limit = what, self.seconds * patience
        self._last = time.monotonic()

    def _watch(self) -> None:
        pause = min(1.0, self.seconds / 4)
        while not self._done.wait(pause):
            # Backup for a call that never releases the interpreter lock, which would block this
            # thread: faulthandler's timer runs without the lock.
            faulthandler.dump_traceback_later(self.seconds + 60, exit=True)
            if time.monotonic() - self._last > self._limit:
                give_up(
                    f"no progress for {self._limit:g} s (faults.stall_seconds) while {self._what}",
                    self._path,
                )


def give_up(why: str, path: Path | None = None) -> None:
    """Print the reason and every thread's stack, and end the process even if threads hang."""
    say(f"error: {why}; stacks of all threads follow")
    faulthandler.dump_traceback(2, all_threads=True)  # standard error, by its file descriptor
    if path is not None:
        try:
            with open(path, "w") as file:
                file.write(why + "\n")
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
        except OSError:
            pass
    os._exit(STALLED)


class Progress:
    """Progress output: a bar with rate and time left on a terminal, plain lines elsewhere."""

    def __init__(self, steps: int, start: int, shown: bool, out: TextIO | None = None):
        self._steps, self._start, self._shown = steps, start, shown
        self._out = out or sys.stderr
        self._bar = shown and self._out.isatty()
        self._begun: float | None = None
        self._drawn = 0.0

    def step(self, step: int) -> None:
        """Count a dispatched step, and redraw the bar."""
        now = time.monotonic()
        if self._begun is None:  # the first step compiles, so it is left out of the rate
            self._begun, self._start = now, step
        if self._bar and now - self._drawn > 0.2:
            self._drawn = now
            full = 24 * step // max(self._steps, 1)
            bar = "█" * full + "░" * (24 - full)
            self._out.write(f"\r{bar} {step}/{self._steps} {self._rate(step)}\x1b[K")
            self._out.flush()

    def line(self, step: int, values: Mapping[str, float], clips: int) -> None:
        """Print a step's metrics in one line."""
        if not self._shown:
            return
        words = "  ".join(f"{name} {value:.4g}" for name, value in values.items())
        self._out.write(
            f"{self._head()}step {step}/{self._steps}  {words}  {self._rate(step, clips)}\n"
        )
        self._out.flush()

    def table(self, step: int, values: Mapping[str, float]) -> None:
        """Print many metrics of a step, one per line."""
        if self._shown:
            width = max(map(len, values), default=0)
            lines = "".join(f"  {name:{width}}  {value:.4g}\n" for name, value in values.items())
            self._out.write(f"{self._head()}step {step}/{self._steps}\n{lines}")
            self._out.flush()

    def _head(self) -> str:
        return "\r\x1b[K" if self._bar else ""

    def rewind(self, step: int) -> None:
        """Restart the rate at an earlier step, after a roll-back."""
        self._begun, self._start = None, step

    def _rate(self, step: int, clips: int = 0) -> str:
        done = step - self._start
        if self._begun is None or done < 1:
            return "compiling"
        rate = done / max(time.monotonic() - self._begun, 1e-9)
        speed = f"{rate * clips:.4g} clips/s" if clips else f"{rate:.3g} steps/s"
        return f"{speed}  {duration((self._steps - step) / rate)} left"


def duration(seconds: float) -> str:
    """Format seconds as `1 h 02 min`, `3 min 20 s` or `12 s`."""
    seconds = round(seconds)
    hours, minutes = seconds // 3600, seconds // 60 % 60
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {seconds % 60:02d} s" if minutes else f"{seconds} s"


class Clock:
    """Step timing: waiting for data, computing, and goodput.

    Goodput is the share of the time since the run's first start that was spent computing steps.
    """

    def __init__(self, started: float | None = None, productive: float = 0.0):
        # Wall-clock time of the run's very first start, so that downtime counts as lost.
        self.started = started or time.time()
        self.productive = productive
        self._reset()
        self._last: float | None = None
        self._means: dict[str, float] = {}

    def _reset(self) -> None:
        self._steps, self._wait, self._total = 0, 0.0, 0.0

    def pause(self) -> None:
        """Leave the time until the next step out of the step times."""
        self._last = None

    def step(self, wait: float) -> None:
        """Count a finished step that waited `wait` seconds for its data."""
        now = time.monotonic()
        if self._last is not None:
            self._steps += 1
            self._wait += wait
            self._total += now - self._last
            self.productive += max(now - self._last - wait, 0.0)
        self._last = now

    def metrics(self, clips: int) -> dict[str, float]:
        """Return mean times per step since the last call, for steps of `clips` clips."""
        steps, wait, total = self._steps, self._wait, self._total
        self._reset()
        if steps:
            self._means = {
                "time/step": total / steps,
                "time/data_wait": wait / steps,
                "time/compute": max(total - wait, 0.0) / steps,
                "time/clips_per_second": clips * steps / max(total, 1e-9),
            }
        goodput = self.productive / max(time.time() - self.started, 1e-9)
        return {**self._means, "time/goodput": goodput}


def memory() -> dict[str, float]:
    """Return the memory in use by this process and its first device, in GiB."""
    found = {"memory/host": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}
    stats = jax.local_devices()[0].memory_stats() or {}
    for name, key in (("device", "bytes_in_use"), ("device_peak", "peak_bytes_in_use")):
        if key in stats:
            found[f"memory/{name}"] = stats[key] / 2**30
    return found


def say(line: str) -> None:
    """Print a line to standard error, independent of the logging level."""
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()
