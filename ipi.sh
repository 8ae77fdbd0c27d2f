#!/usr/bin/env bash
# Imitation -> Preference -> Interaction on one task, an evaluation after each, one table at the end.
#   ./ipi.sh [ENV_ID]          stopped runs go on where they were; SEED=2 ./ipi.sh is another training seed
#   SMOKE=1 ./ipi.sh           the same path in a few updates, to see that everything works
set -euo pipefail
cd "$(dirname "$0")"
ENV_ID=${1:-PickCube-v1}
SEED=${SEED:-1}
RUN=${RUN:-runs/ipi/${ENV_ID}__${SEED}}
export OMP_WAIT_POLICY=PASSIVE # idle OpenMP threads must not take the cores from the env processes
./setup.sh

# The budget of each stage: about an hour in all on two CPU cores
SFT=() TPO=() PPO=() EVAL=(--num-eval-episodes 300)
if [ "${SMOKE:-0}" = 1 ]; then
  RUN=runs/smoke/${ENV_ID}__${SEED}
  rm -rf "$RUN"
  SFT=(--num-envs 2 --num-demos 2 --num-updates 2)
  TPO=(--num-envs 2 --num-initial-states 2 --rollouts-per-state 2)
  PPO=(--num-envs 2 --total-timesteps 128)
  EVAL=(--num-envs 2 --num-eval-episodes 2)
fi

# stage NAME SCRIPT ARGS...: trains into $RUN/NAME and evaluates, unless its results are there already
stage() {
  local name=$1 script=$2
  shift 2
  if [ ! -f "$RUN/$name/results.json" ]; then
    echo "== $name: python $script $*"
    .venv/bin/python "$script" --env-id "$ENV_ID" --seed "$SEED" --output-dir "$RUN/$name" --resume --num-eval-episodes 0 "$@"
    .venv/bin/python eval.py --checkpoint "$RUN/$name" --capture-video "${EVAL[@]}"
  fi
}

stage sft sft.py "${SFT[@]}"
stage sta_tpo sta_tpo.py --checkpoint "$RUN/sft" "${TPO[@]}"
stage sta_ppo sta_ppo.py --checkpoint "$RUN/sta_tpo" "${PPO[@]}"

echo
.venv/bin/python eval.py --compare "$RUN"/sft/results.json "$RUN"/sta_tpo/results.json "$RUN"/sta_ppo/results.json
echo "videos: $RUN/*/video.mp4   curves: .venv/bin/tensorboard --logdir $RUN"
