#!/usr/bin/env bash
# Imitation -> Preference -> Interaction on one task, an evaluation after each, one table at the end.
#   ./ipi.sh [ENV_ID]          any task of docs/tasks.md; a stopped run goes on where it was; SEED=2 ./ipi.sh is another training seed
#   SMOKE=1 ./ipi.sh           the same path in a few updates, to see that everything works
set -euo pipefail
cd "$(dirname "$0")"
ENV_ID=${1:-PickCube-v1}
SEED=${SEED:-1}
RUNS=runs
export OMP_WAIT_POLICY=PASSIVE # idle OpenMP threads must not take the cores from the env processes
./setup.sh

# What each stage gets: about an hour in all on two CPU cores
STEPS="sft sta_tpo sta_ppo" SFT=() TPO=() PPO=() EVAL=(--num-eval-episodes 300)
if [ "${SMOKE:-0}" = 1 ]; then
  RUNS=runs/smoke
  rm -rf "$RUNS"
  SFT=(--num-envs 2 --num-demos 2 --num-updates 2)
  if [ -d "checkpoints/${ENV_ID}__sft" ]; then
    SFT+=(--vla "checkpoints/${ENV_ID}__sft" --learning-rate 1e-6)
  else
    STEPS="sft sta_ppo" # an untrained policy's roll-outs all end alike: no pairs
  fi
  TPO=(--num-envs 2 --num-initial-states 2 --rollouts-per-state 3)
  PPO=(--num-envs 2 --total-timesteps 256 --critic-warmup 0)
  EVAL=(--num-envs 2 --num-eval-episodes 2)
fi

# stage SCRIPT ARGS...: trains and evaluates, unless the results are there already
stage() {
  local script=$1 folder="$RUNS/${ENV_ID}__$1__${SEED}__ipi"
  shift
  [ -f "$folder/results.json" ] && return
  echo "== python $script.py $*"
  .venv/bin/python "$script.py" --env-id "$ENV_ID" --seed "$SEED" --output-dir "$folder" --resume --num-eval-episodes 0 "$@"
  .venv/bin/python eval.py --checkpoint "$folder" --capture-video "${EVAL[@]}"
}

RESULTS=() FROM=()
for STEP in $STEPS; do
  case $STEP in sft) ARGS=("${SFT[@]}") ;; sta_tpo) ARGS=("${TPO[@]}") ;; sta_ppo) ARGS=("${PPO[@]}") ;; esac
  stage "$STEP" "${FROM[@]}" "${ARGS[@]}"
  RUN="$RUNS/${ENV_ID}__${STEP}__${SEED}__ipi"
  FROM=(--checkpoint "$RUN") RESULTS+=("$RUN/results.json")
done

echo
.venv/bin/python eval.py --compare "${RESULTS[@]}"
echo "videos: $RUNS/${ENV_ID}__*__${SEED}__ipi/video.mp4   curves: .venv/bin/tensorboard --logdir $RUNS"
