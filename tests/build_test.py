import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import toy_source

from stoa_jax.data import builders, pipeline
from stoa_jax.data import split as splits
from stoa_jax.data.build import __main__ as command
from stoa_jax.data.build import manifest, shards
from stoa_jax.errors import UserError

HERE = Path(__file__).parent


def failures(directory):
    return [json.loads(line) for line in (directory / "failures.jsonl").read_text().splitlines()]


def test_shards_are_fixed_by_the_order_alone():
    for entries, count, size in ((1, 1, 1), (16, 1, 16), (17, 2, 16), (40, 3, 16), (3000, 64, 47)):
        parts = shards.shards_of("train", entries)
        assert len(parts) == count and parts[0].stop == size
        assert [p.start for p in parts[1:]] == [p.stop for p in parts[:-1]]
        assert parts[-1].stop == entries and {p.count for p in parts} == {count}
    assert shards.shards_of("t", 2_500_000)[0].stop == 1024


def test_bytes_do_not_depend_on_the_number_of_processes(tmp_path):
    for processes in (1, 2, 3):
        source = toy_source.Source(
            {"train": 40, "test": 5}, faults={("train", 3): "raise", ("train", 20): "one empty"}
        )
        summary = toy_source.build(tmp_path / str(processes), source, processes=processes)
        assert summary.built == {"train": 39, "test": 5}
    one, two, three = (toy_source.tree(tmp_path / str(p)) for p in (1, 2, 3))
    assert len([name for name in one if ".array_record-" in name]) == 4
    assert one == two == three


def test_clips_that_fail_are_counted_and_named(tmp_path):
    faults = {
        ("train", 1): "raise",
        ("train", 4): "crash",
        ("train", 18): "empty",
        ("train", 19): "one empty",
        ("test", 0): "hang",
    }
    source = toy_source.Source({"train": 20, "test": 2}, faults=faults)
    summary = toy_source.build(tmp_path, source, processes=2, timeout=6.0)
    assert summary.built == {"train": 17, "test": 1}
    assert summary.failed == {"train": 3, "test": 1}
    assert summary.dropped == 1
    named = {(f["split"], f["video"]): f["error"] for f in failures(tmp_path)}
    assert named == {
        ("train", "train1"): "moov atom not found",
        ("train", "train4"): "the decoder crashed (SIGSEGV)",
        ("train", "train18"): "no caption with words",
        ("train", "train19"): "caption 3 has no words; left out",
        ("test", "test0"): "not decoded in 6 s; given up",
    }
    split = pipeline.open_split(tmp_path, "folder/captions", "train")
    ids = [split.metadata(i).video_id for i in range(len(split))]
    assert ids == [f"train{i}" for i in range(20) if i not in (1, 4, 18)]
    assert [split.read(i)["video_id"].decode() for i in range(len(split))] == ids


def test_a_shard_of_failures_only_is_no_hole(tmp_path):
    faults = {("train", i): "raise" for i in range(16, 32)}
    summary = toy_source.build(tmp_path, toy_source.Source({"train": 40}, faults=faults))
    assert summary.built == {"train": 24}
    split = pipeline.open_split(tmp_path, "folder/captions", "train")
    read = [split.read(i)["video_id"].decode() for i in range(24)]
    assert read == [f"train{i}" for i in range(40) if not 16 <= i < 32]


def test_nothing_built_is_an_error_and_leaves_no_set(tmp_path):
    faults = {("train", i): "raise" for i in range(3)}
    with pytest.raises(UserError, match=r"none of 3 clips.*train0: moov atom not found"):
        toy_source.build(tmp_path, toy_source.Source({"train": 3}, faults=faults))
    assert len(failures(tmp_path)) == 3
    assert splits.dataset_directory(tmp_path, "folder/captions") is None
    with pytest.raises(UserError, match="no clip is listed"):
        toy_source.build(tmp_path, toy_source.Source({"train": 0}))
    toy_source.build(tmp_path, toy_source.Source({"train": 3}))
    assert failures(tmp_path) == []


def test_failures_of_other_sets_stay(tmp_path):
    source = toy_source.Source({"train": 2}, faults={("train", 0): "raise"})
    toy_source.build(tmp_path, source)
    toy_source.build(tmp_path, source, "webvid/captions")
    toy_source.build(tmp_path, source)
    assert [f["dataset"] for f in failures(tmp_path)] == ["webvid/captions", "folder/captions"]


def test_a_finished_set_is_not_built_again(tmp_path):
    log = tmp_path / "log"
    source = toy_source.Source({"train": 20}, faults={("train", 17): "raise"}, log=log)
    toy_source.build(tmp_path / "out", source)
    before, read = toy_source.tree(tmp_path / "out"), log.read_text()
    summary = toy_source.build(tmp_path / "out", source)
    assert summary.built == {"train": 19} and log.read_text() == read
    assert toy_source.tree(tmp_path / "out") == before
    mended = toy_source.Source({"train": 20}, log=log)
    with pytest.raises(UserError, match="now list other clips; --overwrite"):
        toy_source.build(tmp_path / "out", mended)
    other = builders.Settings(**{**vars(toy_source.SETTINGS), "frames": 3})
    with pytest.raises(UserError, match="frames was 4 and is 3 now; --overwrite"):
        toy_source.build(tmp_path / "out", source, settings=other)
    summary = toy_source.build(tmp_path / "out", mended, overwrite=True)
    assert summary.built == {"train": 20}
    assert failures(tmp_path / "out") == []


def test_retry_encodes_only_what_failed(tmp_path):
    log, out = tmp_path / "log", tmp_path / "out"
    faults = {("train", 17): "raise", ("train", 18): "one empty", ("train", 35): "one empty"}
    source = toy_source.Source({"train": 40}, faults=faults, log=log)
    toy_source.build(out, source)
    before = toy_source.tree(out)

    def again(**how):
        log.write_text("")
        assert toy_source.build(out, source, **how).built == {"train": 39}
        assert toy_source.tree(out) == before  # the clip fails again
        return log.read_text().split()

    assert again(retry_failed=True) == ["train17"]
    # Killed during the retry; then with a file that no longer belongs to the list.
    final = out / "folder" / "captions" / "1.0.0"
    for size, encoded in ((0, ["train17"]), (1, [f"train{i}" for i in range(16, 32)])):
        unfinished = final.rename(final.with_name("1.0.0.building"))
        shards.set_aside(unfinished)
        with open(unfinished / "folder-train.array_record-00001-of-00003", "ab") as file:
            file.write(bytes(size))
        assert again() == encoded


BUILD = """
import sys
sys.path.insert(0, {here!r})
import toy_source
if __name__ == "__main__":
    source = toy_source.Source({{"train": 80}}, delay=0.05, log={log!r})
    toy_source.build({out!r}, source, processes={processes}, {extra})
"""


def start(tmp_path, out, processes=2, extra=""):
    script = tmp_path / f"{out}.py"
    script.write_text(
        BUILD.format(
            here=str(HERE / "support"),
            log=str(tmp_path / f"{out}.log"),
            out=str(tmp_path / out),
            processes=processes,
            extra=extra,
        )
    )
    env = {**os.environ, "PYTHONPATH": f"{HERE.parent}:{os.environ.get('PYTHONPATH', '')}"}
    return subprocess.Popen(
        [sys.executable, str(script)], stderr=subprocess.PIPE, text=True, env=env
    )


def test_a_build_killed_in_the_middle_goes_on_where_it_was(tmp_path):
    process = start(tmp_path, "killed")
    clips = tmp_path / "killed" / "folder" / "captions" / "1.0.0.building" / "clips"
    until = time.monotonic() + 60
    while len(list(clips.glob("*.jsonl"))) < 2 and time.monotonic() < until:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    finished = {p.name: p.stat().st_mtime_ns for p in clips.glob("*.jsonl")}
    assert 2 <= len(finished) < 5
    # Its processes end with it.
    log = tmp_path / "killed.log"
    time.sleep(1.0)
    size = log.stat().st_size
    time.sleep(0.3)
    assert log.stat().st_size == size
    log.write_text("")
    again = start(tmp_path, "killed")
    assert again.wait(timeout=120) == 0, again.stderr.read()
    # No clip of a finished shard was read again, and the bytes equal those of an undisturbed run.
    done = {f"train{i}" for name in finished for i in shard_clips(name)}
    assert not done & set(log.read_text().split())
    assert len(set(log.read_text().split())) == 80 - len(done)
    whole = start(tmp_path, "whole", processes=1)
    assert whole.wait(timeout=120) == 0
    assert toy_source.tree(tmp_path / "killed") == toy_source.tree(tmp_path / "whole")


def shard_clips(name):
    shard = shards.shards_of("train", 80)[int(name.split("-")[1])]
    return range(shard.start, shard.stop)


def test_a_torn_shard_is_built_again(tmp_path):
    source = toy_source.Source({"train": 40})
    toy_source.build(tmp_path / "a", source)
    whole = toy_source.tree(tmp_path / "a")
    final = tmp_path / "a" / "folder" / "captions" / "1.0.0"
    final.rename(final.with_name("1.0.0.building"))
    torn = next(final.with_name("1.0.0.building").glob("*.array_record-00001*"))
    torn.write_bytes(torn.read_bytes()[:1000])
    toy_source.build(tmp_path / "a", source)
    assert toy_source.tree(tmp_path / "a") == whole


def test_a_full_disk_is_one_clear_error_and_no_loss(tmp_path):
    limit = "__import__('resource').setrlimit(__import__('resource').RLIMIT_FSIZE, (70000, 70000))"
    process = start(tmp_path, "full", extra=f"limit=0 * len(str({limit}))")
    assert process.wait(timeout=120) == 1
    message = process.stderr.read().strip().splitlines()[-1]
    assert message.startswith("stoa_jax.errors.UserError: cannot write ")
    assert "File too large" in message and "run the same command again" in message
    again = start(tmp_path, "full")
    assert again.wait(timeout=120) == 0, again.stderr.read()
    split = pipeline.open_split(tmp_path / "full", "folder/captions", "train")
    assert [split.read(i)["video_id"].decode() for i in range(80)] == [
        f"train{i}" for i in range(80)
    ]


def test_two_builds_of_one_set_do_not_meet(tmp_path):
    directory = tmp_path / "folder" / "captions"
    directory.mkdir(parents=True)
    with manifest.lock(directory / ".lock"):
        with pytest.raises(UserError, match="another process is building there"):
            toy_source.build(tmp_path, toy_source.Source({"train": 2}))


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["nothing"], "no data set 'nothing'; there are synthetic/captions"),
        (["msrvtt/dancing"], "no data set 'msrvtt/dancing'"),
        (["folder"], "give --manual-dir=DIR"),
        (["folder", "--manual-dir=/nowhere"], "--manual-dir=/nowhere: no such directory"),
        (["synthetic/qa", "--option=size"], "--option=size: write KEY=VALUE"),
        (["synthetic/qa", "--option=colour=3"], "no option 'colour'"),
        (["synthetic/qa", "--frames=0"], "--frames must be at least 1"),
    ],
)
def test_mistakes_on_the_command_line_are_one_line(tmp_path, capsys, args, message):
    assert command.main([*args, f"--data-dir={tmp_path}"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and message in error


def test_data_dir_that_cannot_be_written(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    args = ["synthetic/captions", "--option=train=2", f"--data-dir={tmp_path / 'file'}"]
    assert command.main(args) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_stopped_build_says_so_and_leaves_no_process(tmp_path):
    env = {**os.environ, "PYTHONPATH": str(HERE.parent)}
    command = [sys.executable, "-m", "stoa_jax.data.build", "synthetic/captions"]
    command += [f"--data-dir={tmp_path}", "--processes=2", "--tagger=none", "--option=train=3000"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=env)
    clips = tmp_path / "synthetic" / "captions" / "1.0.0.building" / "clips"
    until = time.monotonic() + 60
    while not list(clips.glob("*.jsonl")) and time.monotonic() < until:
        time.sleep(0.01)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == 130
    assert (
        process.stderr.read().splitlines()[-1] == "stopped; run the same command again to continue"
    )
    # The resource tracker ends a moment later.
    until = time.monotonic() + 20
    while any(Path(f"/proc/{pid}").exists() for pid in children) and time.monotonic() < until:
        time.sleep(0.05)
    assert len(children) >= 2 and not any(Path(f"/proc/{pid}").exists() for pid in children)
