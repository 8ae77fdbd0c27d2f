#!/usr/bin/env bash
# What stage-awareness adds: TPO against STA-TPO, and PPO with sparse, dense and stage reward, all from one SFT checkpoint of each task, at equal budgets.
#   SEEDS="1 2 3" STEPS=9600 benchmark/ablation.sh [ENV_ID ...]
# Equal budgets: 9,600 env steps for each PPO; the same 128 roll-outs, at most 24 pairs per initial state and one pass over them for each TPO:
# whole trajectories, stages, stages with pairs by completion alone, stages with the sum of the distances as cost.
# Resumable: what has a results.json is left as it is. Then: python benchmark/ablation.py runs/*__ablation
set -euo pipefail
cd "$(dirname "$0")/.."
export OMP_WAIT_POLICY=PASSIVE
PYTHON=${PYTHON:-.venv/bin/python}

run() { echo "$(date -u +%H:%M:%S) $*"; "$PYTHON" "$@"; }
evaluate() { [ -f "$1/results.json" ] || run eval.py --checkpoint "$1" --num-eval-episodes 200 --num-envs 6 "${@:2}"; }
# variant NAME ARGS...: trains on STA-TPO's roll-outs with other arguments
variant() {
  local RUN=runs/${ENV_ID}__${1,,}__${SEED}__ablation
  mkdir -p "$RUN"
  [ -d "$RUN/rollouts" ] || cp -r "$STA/rollouts" "$STA/source.txt" "$RUN/"
  [ -f "$RUN/results.json" ] || run sta_tpo.py "${COMMON[@]}" "${STATES[@]}" --output-dir "$RUN" "${@:2}"
  evaluate "$RUN" --method "$1"
}

for ENV_ID in ${*:-StackCube-v1 LiftPegUpright-v1}; do
  SFT=checkpoints/${ENV_ID}__sft # the shipped ones of both tasks were made by the next lines
  if [ ! -d "$SFT" ]; then
    SFT=runs/${ENV_ID}__sft__1__ablation
    [ -f "$SFT/results.json" ] || run sft.py --env-id "$ENV_ID" --output-dir "$SFT" --resume --num-demos 400 --num-updates 1500 --num-eval-episodes 0
    evaluate "$SFT"
  fi
  COMMON=(--env-id "$ENV_ID" --checkpoint "$SFT" --resume --num-eval-episodes 0)
  for SEED in ${SEEDS:-1 2 3}; do
    for METHOD in stare sparse dense; do
      RUN=runs/${ENV_ID}__ppo_${METHOD}__${SEED}__ablation
      [ -f "$RUN/results.json" ] || run sta_ppo.py "${COMMON[@]}" --seed "$SEED" --output-dir "$RUN" --reward $METHOD \
        --total-timesteps "${STEPS:-9600}" --no-anneal-lr
      evaluate "$RUN"
    done
  done
  for SEED in ${SEEDS:-1 2 3}; do
    STA=runs/${ENV_ID}__sta_tpo__${SEED}__ablation STATES=(--seed "$SEED" --num-initial-states 16)
    [ -f "$STA/results.json" ] || run sta_tpo.py "${COMMON[@]}" "${STATES[@]}" --output-dir "$STA"
    evaluate "$STA"
    variant TPO --no-stage-aware --max-pairs-per-stage 24
    variant STA-TPO-completed --cost-margin 1e9
    variant STA-TPO-sum --cost-sum --cost-coef 0.01 # a sum is some ten times a mean
  done
done
