#!/usr/bin/env bash
# Trains the checkpoint that ships as stoa_jax.load("synthetic"), from the live synthetic world.
#
#   bash launch/train_synthetic.sh [WORKDIR [FLAGS…]]      # default: runs/synthetic
#
# Needs no data set, and works on CPU cores and on a GPU. Run it again after a stop to continue. It
# ends with the metrics on the test split and a checkpoint directory, WORKDIR/checkpoint, which can
# replace stoa_jax/checkpoints/synthetic. FLAGS are passed to every stage.
#
# The shipped checkpoint was made with these stages, each started by hand (its card has their times).
# With --config.model.frames=1, where a clip is one frame, the script itself ran from `words` to the
# end, on an existing CLIP.
# shellcheck source=launch/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
setup requirements.txt
work="${1:-runs/synthetic}"
flags=("${@:2}")

# On CPU cores, returning memory to the system in every step costs a seventh of the time.
export MALLOC_MMAP_THRESHOLD_=4294967296 MALLOC_TRIM_THRESHOLD_=8589934592

run() { # run NAME CONFIG [FLAGS…]: a stage, unless it is done
  local name="$1" config="$2"
  shift 2
  [ -f "$work/$name/result.json" ] ||
    "$PYTHON" -m stoa_jax.main --config="configs/$config" --workdir="$work/$name" "$@" \
      "${flags[@]}"
  # A stage that was asked to stop exits with 0, but writes no result.
  [ -f "$work/$name/result.json" ] || stop "stopped in $name; run this again to continue"
}

run clip clip.py:live
[ -e "$work/clip-hf" ] ||
  "$PYTHON" -m stoa_jax.convert "$work/clip" "$work/clip-hf" --to=hugging_face
# The stages render the same clips and run the same frozen vision tower: do both once.
flags+=(--config.data.live_dir="$work/cache")
run words joint.py:words --config.init.path="$work/clip-hf"
run motion joint.py:motion --config.init.path="$work/words"
run heads joint.py:heads --config.init.path="$work/motion"
run match joint.py:match --config.init.path="$work/heads"
for mode in calibrate eval; do
  "$PYTHON" -m stoa_jax.main --config=configs/joint.py:match --workdir="$work/match" \
    --config.init.path="$work/heads" --mode="$mode" "${flags[@]}"
done
[ -e "$work/checkpoint" ] ||
  "$PYTHON" -m stoa_jax.checkpoints "$work/match" "$work/checkpoint"
