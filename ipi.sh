#!/usr/bin/env bash
# Imitation -> Preference -> Interaction on one task, an evaluation after each, one table at the end.
#   ./ipi.sh [ENV_ID]          any task of docs/tasks.md; a stopped run goes on where it was
#   SEED=2 ./ipi.sh            another training seed
#   SMOKE=1 ./ipi.sh           the same path in a few updates, to see that everything works
set -euo pipefail
cd "$(dirname "$0")"
if [ $# -gt 1 ]; then
  echo "ipi.sh takes a task alone; the flags of each script stand in this file" >&2
  exit 2
fi
ENV_ID=${1:-PickCube-v1}
SEED=${SEED:-1}
RUNS=runs
# Idle OpenMP threads must not take the cores from the env processes.
export OMP_WAIT_POLICY=PASSIVE
./setup.sh

# Flags of each script. Its defaults are the best settings known.
STEPS="sft sta_tpo sta_ppo" SFT=() TPO=() PPO=() EVAL=(--num-eval-episodes 300)
if [ "${SMOKE:-0}" = 1 ]; then
  RUNS=runs/smoke
  rm -rf "$RUNS"
  SFT=(--num-envs 2 --num-demos 2 --num-updates 2)
  if [ -d "checkpoints/${ENV_ID}__sft" ]; then
    SFT+=(--vla "checkpoints/${ENV_ID}__sft" --learning-rate 1e-6)
  else
    # The roll-outs of an untrained policy all end alike, so they make no pairs.
    STEPS="sft sta_ppo"
  fi
  TPO+=(--num-envs 2 --num-initial-states 2 --rollouts-per-state 3)
  PPO=(--num-envs 2 --total-timesteps 256 --critic-warmup 0)
  EVAL=(--num-envs 2 --num-eval-episodes 2)
fi

folder() { echo "$RUNS/${ENV_ID//,/+}__$1__${SEED}__ipi"; }
minutes() { echo "$(((SECONDS - $1) / 60)) min $(((SECONDS - $1) % 60)) s"; }

# stage SCRIPT ARGS...: trains and evaluates, unless the results are there already
stage() {
  local script=$1 run begin=$SECONDS
  run=$(folder "$1")
  shift
  [ -f "$run/results.json" ] && return
  echo "== python $script.py $*"
  .venv/bin/python "$script.py" --env-id "$ENV_ID" --seed "$SEED" --output-dir "$run" --resume --num-eval-episodes 0 "$@"
  echo "== $script.py took $(minutes "$begin") here; evaluating"
  begin=$SECONDS
  .venv/bin/python eval.py --checkpoint "$run" --capture-video "${EVAL[@]}"
  echo "== the evaluation took $(minutes "$begin") here; $run/report.html"
}

echo "plan: $ENV_ID, training seed $SEED"
# What is left of a chain that was begun takes less time.
if [ "${SMOKE:-0}" != 1 ] && [ ! -e "$(folder sft)" ]; then
  # An unknown task ends here.
  ESTIMATE=$(.venv/bin/python benchmark/estimate.py "$ENV_ID")
  echo "  $ESTIMATE"
fi
for STEP in $STEPS; do
  run=$(folder "$STEP") state=""
  if [ -f "$run/results.json" ]; then state=" (done already, reused)"; elif [ -d "$run/checkpoint" ]; then state=" (begun, goes on)"; fi
  case $STEP in
    sft) what="imitation: the expert's demonstrations, cross-entropy" ;;
    sta_tpo) what="preference: roll-outs of that policy, compared stage by stage" ;;
    sta_ppo) what="interaction: PPO with the stage reward" ;;
  esac
  echo "  $STEP.py, then eval.py -> $run  $what$state"
done

RESULTS=() FROM=()
for STEP in $STEPS; do
  case $STEP in sft) ARGS=("${SFT[@]}") ;; sta_tpo) ARGS=("${TPO[@]}") ;; sta_ppo) ARGS=("${PPO[@]}") ;; esac
  stage "$STEP" "${FROM[@]}" "${ARGS[@]}"
  RUN=$(folder "$STEP")
  FROM=(--checkpoint "$RUN") RESULTS+=("$RUN/results.json")
done

echo
.venv/bin/python eval.py --compare "${RESULTS[@]}"
echo "table, curves, stages and commands of each run: $(folder '*')/report.html   videos: video.mp4 there   TensorBoard: .venv/bin/tensorboard --logdir $RUNS"
