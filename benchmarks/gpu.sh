#!/usr/bin/env bash
# Compare the training step with PyTorch on one GPU, within nine minutes.
#
#   bash benchmarks/gpu.sh              # `base`, bfloat16, 32 clips, six losses
#   bash benchmarks/gpu.sh --dry-run    # the same on a CPU at toy sizes, in five minutes on one core
#
# Needs jax, flax, optax and torch, and installs nothing. Each result is at once printed and appended
# to runs/benchmarks/gpu.jsonl. PYTHON names the interpreter.
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
exec timeout --kill-after=5 540 "${PYTHON:-python3}" -m benchmarks.gpu "$@"
