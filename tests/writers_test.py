"""The metric files, read by their usual readers."""

import importlib.util
import inspect
import json
import subprocess
import sys

import numpy as np
import pytest

from stoa_jax import writers


def clu_interface():
    """Load clu's class from its file: importing the package would import TensorFlow."""
    package = importlib.util.find_spec("clu").submodule_search_locations[0]
    path = f"{package}/metric_writers/interface.py"
    spec = importlib.util.spec_from_file_location("clu_interface", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.MetricWriter


@pytest.mark.parametrize(
    "ours", [writers.Writer, writers.Writers, writers.JsonLines, writers.TensorBoard]
)
def test_the_interface_is_clus(ours):
    theirs = clu_interface()
    assert theirs.__abstractmethods__
    for name in theirs.__abstractmethods__:
        method = getattr(ours, name)
        wanted = list(inspect.signature(getattr(theirs, name)).parameters)
        found = inspect.signature(method).parameters
        if any(p.kind is p.VAR_KEYWORD for p in found.values()):
            continue
        assert list(found) == wanted, name


def test_json_lines(tmp_path):
    path = tmp_path / "m.jsonl"
    writer = writers.JsonLines(path)
    writer.write_scalars(1, {"loss": np.float32(0.5), "n": 3})
    writer.write_scalars(2, {"loss": float("nan")})
    rows = writers.read_lines(path)  # before it is closed
    assert rows[0] == {"step": 1, "loss": 0.5, "n": 3}
    assert np.isnan(rows[1]["loss"])
    writer.close()


def test_a_resumed_run_drops_what_lies_beyond_and_a_line_that_was_cut(tmp_path):
    path = tmp_path / "m.jsonl"
    writer = writers.JsonLines(path)
    for step in range(1, 6):
        writer.write_scalars(step, {"loss": step / 3})
    writer.close()
    before = path.read_text().splitlines()
    with open(path, "a") as file:
        file.write('{"step": 6, "lo')
    writer = writers.JsonLines(path, start=3)
    writer.write_scalars(4, {"loss": 4 / 3})
    writer.close()
    assert path.read_text().splitlines() == before[:4]


def read_events(folder):
    """Read with TensorBoard's own reader, in a separate process."""
    code = f"""
import json, sys, types
# Its switch for doing without TensorFlow, whose import takes seconds.
sys.modules["tensorboard.compat.notf"] = types.ModuleType("notf")
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
events = EventAccumulator({str(folder)!r}, size_guidance=dict(scalars=0, images=0, tensors=0))
events.Reload()
tags = events.Tags()
print(json.dumps(dict(
    scalars={{t: [(e.step, e.value) for e in events.Scalars(t)] for t in tags["scalars"]}},
    images={{t: [(e.step, e.width, e.height) for e in events.Images(t)] for t in tags["images"]}},
    texts={{t: events.Tensors(t)[0].tensor_proto.string_val[0].decode() for t in tags["tensors"]}},
)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def test_tensorboard_reads_its_files(tmp_path):
    writer = writers.Writers([writers.TensorBoard(tmp_path)])
    values = [1.5, -2.0, 2.0**-90, 1e300, 70000.0]
    for step, value in enumerate(values, 1):
        writer.write_scalars(step * 1000, {"loss": value, "grad_norm/visual": value / 2})
    writer.write_images(7, {"frame": np.zeros((4, 6, 3), np.uint8)})
    writer.write_hparams({"optim.weight_decay": 0.2})
    writer.close()
    found = read_events(tmp_path)
    expected = [[i * 1000, v if v < 1e38 else float("inf")] for i, v in enumerate(values, 1)]
    assert found["scalars"]["loss"] == expected
    assert found["scalars"]["grad_norm/visual"][1] == [2000, -1.0]
    assert found["images"]["frame"] == [[7, 6, 4]]
    assert "| optim.weight_decay | `0.2` |" in found["texts"]["config"]


def test_a_resumed_run_makes_tensorboard_forget_what_lies_beyond(tmp_path):
    first = writers.TensorBoard(tmp_path)
    for step in (1, 2, 3, 4):
        first.write_scalars(step, {"loss": float(step)})
    first.close()
    second = writers.TensorBoard(tmp_path, start=3)
    second.write_scalars(3, {"loss": 30.0})
    second.close()
    assert [s for s, _ in read_events(tmp_path)["scalars"]["loss"]] == [1, 2, 3]
