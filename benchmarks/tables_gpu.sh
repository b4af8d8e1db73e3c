#!/usr/bin/env bash
# Trains Table 4's rows and `plus` in at most nine minutes on one GPU, with one seed, on the live
# synthetic world. All rows train at once, in processes that share the card.
#
#   bash benchmarks/tables_gpu.sh [OUT]             # default: runs/tables_gpu
#   bash benchmarks/tables_gpu.sh OUT --dry-run     # on the CPU, at toy size
#
# A small CLIP is trained first. Every row starts from it, trains answers and the row's losses
# together until the deadline, and is then evaluated on the test split, even if its training is not
# complete. Each row adds a line to OUT/results.md when it ends. MINUTES=20 moves the deadline;
# PYTHON names the interpreter.
# Needs jax, flax, optax, orbax, OpenCV, ml_collections and the tokenizer's packages; no Grain, TFDS,
# clu, TensorFlow or spaCy: with --dry-run these cannot be imported, even if they are installed.
# This script has never run on a GPU. The dry run takes ten minutes on one core.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

out="${1:-runs/tables_gpu}"
PYTHON="${PYTHON:-python}"
minutes="${MINUTES:-9}"
evaluation=100 # seconds reserved for it
at_once=6      # rows
mkdir -p "$out"
: >"$out/results.md"

common=(--config.log.every_steps=50 --config.checkpoint.every_steps=500)
rows=(--config.train.batch_size=128 --config.train.steps=4000 --config.eval.rerank=8)
clip=(--config.train.steps=1500)
if [ "${2:-}" = --dry-run ]; then
  export JAX_PLATFORMS=cpu
  # Compiling takes nearly all of the time, so it is done without optimization, two rows at a time.
  export XLA_FLAGS="--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
  minutes="${MINUTES:-40}" at_once=2
  toy=(model.vision_width=32 model.vision_depth=2 model.vision_heads=2 model.text_width=32
    model.text_heads=2 model.fusion_heads=2 model.text_depth=1 model.fusion_depth=1
    model.trajectory_depth=1 model.action_depth=1 data.world.train=40 data.world.validation=6
    data.world.test=6 train.steps=2 train.batch_size=4 eval.batch_size=4 eval.max_pieces=4)
  for one in "${toy[@]}"; do common+=("--config.$one"); done
  rows=(--config.eval.rerank=2) clip=() evaluation=1
  mkdir -p "$out/without"
  cat >"$out/without/sitecustomize.py" <<'PY'
import sys

for name in ("grain", "tensorflow_datasets", "clu", "tensorflow", "spacy"):
    sys.modules[name] = None  # importing it fails
PY
  export PYTHONPATH="$out/without${PYTHONPATH:+:$PYTHONPATH}"
elif [ $# -gt 1 ]; then
  echo "error: $2: the only option is --dry-run" >&2
  exit 2
fi
export XLA_PYTHON_CLIENT_MEM_FRACTION=0.15 # six processes share the card
deadline=$((SECONDS + minutes * 60 - 10))

main() { # main SECONDS WORKDIR FLAGS…: a run that saves and stops after SECONDS
  local limit="$1" workdir="$2"
  shift 2
  timeout --signal=TERM --kill-after=30 "$limit" \
    "$PYTHON" -m stoa_jax.main --workdir="$workdir" "$@" "${common[@]}" >>"$workdir.log" 2>&1
}

left() { # left RESERVED: seconds until the deadline, minus RESERVED
  local seconds=$((deadline - SECONDS - $1))
  echo $((seconds > 1 ? seconds : 1))
}

row() { # row NAME FLAGS…
  local name="$1" workdir
  workdir="$out/${1//[^a-zA-Z]/}"
  shift
  local flags=(--config=configs/joint.py:words --config.init.path="$out/clip-hf"
    --config.optim.schedule=cosine --config.loss.vtm=1.0 --config.loss.mlm=1.0
    --config.data.questions_per_clip=2 "${rows[@]}" "$@")
  local code=0
  main "$(left "$evaluation")" "$workdir" "${flags[@]}" || code=$?
  if [ "$code" = 0 ] || [ "$code" = 124 ]; then
    code=0
    main "$(left 0)" "$workdir" "${flags[@]}" --mode=eval || code=$?
  fi
  "$PYTHON" - "$name" "$workdir" "$code" >>"$out/results.md" <<'PY'
import json, pathlib, sys

name, workdir, code = sys.argv[1], pathlib.Path(sys.argv[2]), sys.argv[3]
if code != "0" or not (workdir / "results.json").is_file():
    print(f"| {name} | failed with exit code {code}, see {workdir}.log |")
    raise SystemExit
found = {row["metric"]: row["value"] for row in json.loads((workdir / "results.json").read_text())}
lines = (workdir / "metrics.jsonl").read_text().splitlines()
step = json.loads(lines[-1])["step"] if lines else 0
shown = ("qa/accuracy", "qa/kind/way/accuracy", "qa/kind/does/accuracy",
         "multiple_choice/accuracy", "captioning/greedy/CIDEr", "retrieval/reranked/t2v/R@1")
cells = [f"{found[metric]:.2f}" if metric in found else "" for metric in shown]
print(f"| {name} | {step} | {' | '.join(cells)} |")
PY
}

main "$(left "$evaluation")" "$out/clip" --config=configs/clip.py:live "${clip[@]}"
[ -e "$out/clip-hf" ] ||
  "$PYTHON" -m stoa_jax.convert "$out/clip" "$out/clip-hf" --to=hugging_face >>"$out/clip.log" 2>&1
{
  echo "| model | step | questions | which way | what does it do | choice of five | CIDEr | re-ranked R@1 |"
  echo "|---|---|---|---|---|---|---|---|"
} >>"$out/results.md"

paper=(--config.model.trajectory_verbs=False --config.loss.verb=0.0
  --config.model.trajectory_adjectives=False --config.loss.adjective=0.0
  --config.loss.none_weight=1.0 --config.model.alignment_target=sentence --config.loss.match_names=False)
no_ota=(--config.loss.ota=0.0)
no_asp=(--config.loss.asp=0.0)
no_actions=(--config.model.actions=False "${no_asp[@]}")
start() { # start NAME FLAGS…: a row in the background, at most `at_once` at a time
  while [ "$(jobs -rp | wc -l)" -ge "$at_once" ]; do wait -n; done
  row "$@" &
}

start base "${paper[@]}" --config.model.objects=False "${no_ota[@]}" "${no_actions[@]}"
start "+ objects" "${paper[@]}" "${no_ota[@]}" "${no_actions[@]}"
start "+ OTA" "${paper[@]}" "${no_actions[@]}"
start "+ actions" "${paper[@]}" "${no_asp[@]}"
start "+ ASP (full)" "${paper[@]}"
start plus
wait
cat "$out/results.md"
if grep -q failed "$out/results.md"; then exit 1; fi
