#!/usr/bin/env bash
# Benchmark the training step on one GPU beside PyTorch, within nine minutes.
#
#   bash benchmarks/gpu.sh              # `base`, bfloat16, 32 clips, six losses
#   bash benchmarks/gpu.sh --dry-run    # the same on a CPU at toy sizes, in two minutes on two cores
#
# For a machine with jax, flax, optax and torch. Installs nothing. Each result is printed and
# appended to runs/benchmarks/gpu.jsonl as it comes. PYTHON names the interpreter.
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
exec timeout --kill-after=5 540 "${PYTHON:-python3}" -m benchmarks.gpu "$@"
