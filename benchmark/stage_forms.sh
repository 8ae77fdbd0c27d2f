#!/usr/bin/env bash
# A first sign: the forms of the stage reward from a weak imitation, and same-state preferences.
#
#   STEPS=300000 benchmark/stage_forms.sh [ENV_ID]
#
# The imitation has 100 demonstrations (DEMOS). Then python benchmark/funnel.py runs/*__forms
# prints the curves. Resumable. METHODS: sparse, shaping, gain, progress, paced, resets
# (paced with a quarter of the envs in later stages), tpo, branch (equal env steps are up to STATES).
set -euo pipefail
cd "$(dirname "$0")/.."
export OMP_WAIT_POLICY=PASSIVE
PYTHON=${PYTHON:-.venv/bin/python}
ENV_ID=${1:-StackCube-v1}
SEED=${SEED:-1}
STEPS=${STEPS:-300000}
METHODS=${METHODS:-sparse gain paced progress shaping}
of() { echo "runs/${ENV_ID}__$1__${SEED}__forms"; }

# run METHOD SCRIPT FLAGS...: trains and evaluates, unless the results are there already
run() {
  local folder script=$2
  folder=$(of "$1")
  shift 2
  [ -f "$folder/results.json" ] && return
  "$PYTHON" "$script" --env-id "$ENV_ID" --seed "$SEED" --output-dir "$folder" --resume --num-eval-episodes 0 "$@"
  "$PYTHON" eval.py --checkpoint "$folder" --num-eval-episodes 200
}

run sft sft.py --num-demos "${DEMOS:-100}"
FROM=(--checkpoint "$(of sft)")
PPO=(sta_ppo.py "${FROM[@]}" --total-timesteps "$STEPS" --no-anneal-lr)
for METHOD in $METHODS; do
  case $METHOD in
    sparse) run sparse "${PPO[@]}" --reward sparse ;;
    resets) run resets "${PPO[@]}" --stage-reward paced --stage-resets 0.25 ;;
    tpo) run tpo sta_tpo.py "${FROM[@]}" --num-initial-states "${STATES:-64}" ;;
    branch) run branch sta_tpo.py "${FROM[@]}" --num-initial-states "${STATES:-64}" --branch ;;
    *) run "$METHOD" "${PPO[@]}" --stage-reward "$METHOD" ;;
  esac
done
