#!/usr/bin/env bash
# Runs one command on every host of a TPU pod slice; JAX finds the other hosts.
#
#   TPU=my-slice ZONE=us-west4-a launch/tpu_pod.sh \
#     --config=configs/pretrain.py:webvid --workdir=/mnt/runs/pretrain
#
# TPU    name of the slice, created before with
#        gcloud compute tpus tpu-vm create "$TPU" --zone="$ZONE" \
#          --accelerator-type=v5litepod-256 --version=v2-alpha-tpuv5-lite
# ZONE   its zone;  PROJECT  its project (gcloud's own if empty)
# DATA   directory of the built data sets on the hosts (default: ~/data), a mounted bucket or a copy
#
# --workdir must be one directory that all hosts see (Filestore, or a bucket mounted with gcsfuse).
# After a preemption, create the slice again and run the same command: it continues from the last
# checkpoint.
# Before you pay for a slice: python -m stoa_jax.main --mode=plan --topology=v5e:16x16 --config=…
set -euo pipefail

if [[ -z "${TPU:-}" || -z "${ZONE:-}" || $# -eq 0 ]]; then
  echo "usage: TPU=name ZONE=zone $0 --config=… --workdir=… [flags of stoa_jax.main]" >&2
  exit 2
fi
if ! command -v gcloud >/dev/null; then
  echo "gcloud is missing: https://cloud.google.com/sdk/docs/install" >&2
  exit 2
fi
here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
where=("$TPU" "--zone=$ZONE")
[[ -z "${PROJECT:-}" ]] || where+=("--project=$PROJECT")

# Copy the code of this checkout, and nothing else.
bundle=$(mktemp --suffix=.tgz)
trap 'rm -f "$bundle"' EXIT
tar -C "$here" -czf "$bundle" --exclude='__pycache__' \
  pyproject.toml README.md LICENSE stoa_jax configs
gcloud compute tpus tpu-vm scp "$bundle" "${where[0]}:stoa_jax.tgz" "${where[@]:1}" --worker=all

# One process per host. printf %q quotes the arguments for the remote shell.
arguments=$(printf ' %q' "$@")
gcloud compute tpus tpu-vm ssh "${where[@]}" --worker=all --command="
  set -eu
  mkdir -p stoa_jax_run && tar -C stoa_jax_run -xzf stoa_jax.tgz && cd stoa_jax_run
  [ -d .venv ] || python3 -m venv .venv
  .venv/bin/pip install --quiet '.[train,tpu]'
  export STOA_DATA=${DATA:-\$HOME/data}
  exec .venv/bin/python -m stoa_jax.main$arguments
"
