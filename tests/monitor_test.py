"""Progress and clock."""

import io

import pytest

from stoa_jax import monitor


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def time_passes(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(monitor.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(monitor.time, "time", lambda: now[0])
    return lambda seconds: now.__setitem__(0, now[0] + seconds)


def test_a_plain_line_where_there_is_no_terminal(time_passes):
    out = io.StringIO()
    progress = monitor.Progress(100, 0, True, out)
    for step in range(1, 12):
        time_passes(30 if step == 1 else 2)  # the first compiles
        progress.step(step)
    progress.line(11, {"loss": 3.25}, clips=64)
    assert out.getvalue() == "step 11/100  loss 3.25  32 clips/s  2 min 58 s left\n"


def test_a_bar_on_a_terminal(time_passes):
    out = Terminal()
    progress = monitor.Progress(4, 0, True, out)
    for step in (1, 2):
        time_passes(1)
        progress.step(step)
    assert out.getvalue().split("\r")[-1].startswith("█" * 12 + "░" * 12 + " 2/4 1 steps/s  2 s")


def test_nothing_where_it_is_not_shown():
    out = io.StringIO()
    progress = monitor.Progress(4, 0, False, out)
    progress.step(1)
    progress.line(1, {"loss": 1.0}, 8)
    assert out.getvalue() == ""


def test_step_time_is_split_and_goodput_counts_what_was_lost(time_passes):
    clock = monitor.Clock()
    time_passes(20)  # starting, compiling
    clock.step(0.0)
    for _ in range(4):
        time_passes(5)
        clock.step(wait=2.0)
    found = clock.metrics(clips=10)
    assert found["time/step"] == 5 and found["time/data_wait"] == 2 and found["time/compute"] == 3
    assert found["time/clips_per_second"] == 2
    assert found["time/goodput"] == pytest.approx(12 / 40)
    clock.pause()
    time_passes(60)  # an evaluation
    clock.step(0.0)
    assert clock.metrics(10)["time/goodput"] == pytest.approx(12 / 100)


@pytest.mark.parametrize(
    ("seconds", "words"), [(12, "12 s"), (200, "3 min 20 s"), (3720, "1 h 02 min")]
)
def test_durations(seconds, words):
    assert monitor.duration(seconds) == words
