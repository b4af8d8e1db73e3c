#!/usr/bin/env bash
#SBATCH --job-name=stoa
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@90
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=stoa-%j.log
#
# Runs one process per node with all its GPUs; JAX finds the nodes through Slurm's environment.
#
#   sbatch --nodes=4 launch/slurm.sh --config=configs/pretrain.py:webvid --workdir=/shared/runs/a
#
# Run it from the root of a checkout whose .venv has `pip install '.[train,cuda]'`, or set PYTHON.
# 90 s before the time limit, and at a preemption, every process gets SIGTERM: all save the same
# step and exit with 0. The job then queues itself again until the run has finished.
# Before queueing: python -m stoa_jax.main --mode=plan --topology=gpu:16 --config=…
set -euo pipefail

if [[ -z "${SLURM_JOB_ID:-}" ]]; then
  echo "usage: sbatch [sbatch's flags] $0 --config=… --workdir=… [flags of stoa_jax.main]" >&2
  exit 2
fi
cd "${SLURM_SUBMIT_DIR:-.}"
PYTHON=${PYTHON:-.venv/bin/python}
if ! command -v "$PYTHON" >/dev/null; then
  echo "no $PYTHON here: make .venv with pip install '.[train,cuda]', or set PYTHON" >&2
  exit 2
fi
workdir=
for argument in "$@"; do
  case $argument in --workdir=*) workdir=${argument#--workdir=} ;; esac
done
if [[ -z "$workdir" ]]; then
  echo "--workdir=… is missing; it must be on a file system that all nodes share" >&2
  exit 2
fi

code=0
srun --kill-on-bad-exit=1 "$PYTHON" -m stoa_jax.main "$@" || code=$?
if [[ $code -eq 0 && ! -e "$workdir/result.json" ]]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
