#!/usr/bin/env bash
# STA-TPO with summed costs and with the paper's mean, from the same roll-outs (64 initial states x 8, the defaults), of the shipped imitation or another:
#   SEED=2 FORMS="sum mean" benchmark/cost_form.sh [ENV_ID]
#   CHECKPOINT=runs/PickCube-v1__sft__1__ipi EPISODES=300 benchmark/cost_form.sh     # of benchmark/cpu_ipi.sh's
# Resumable. On two CPU cores about 10 minutes a form, 5 of which are the roll-outs of the first one.
set -euo pipefail
cd "$(dirname "$0")/.."
export OMP_WAIT_POLICY=PASSIVE
ENV_ID=${1:-PickCube-v1} SEED=${SEED:-1}
for FORM in ${FORMS:-sum mean}; do
  RUN=runs/${ENV_ID}__sta_tpo__${SEED}__$FORM FLAGS=()
  [ "$FORM" = mean ] || FLAGS=(--cost-sum --cost-coef 0.01) # a sum is some ten times a mean
  [ -f "$RUN/results.json" ] && continue
  mkdir -p "$RUN"
  for OTHER in sum mean; do
    FROM=runs/${ENV_ID}__sta_tpo__${SEED}__$OTHER
    [ -d "$RUN/rollouts" ] || [ ! -f "$FROM/results.json" ] || cp -r "$FROM/rollouts" "$FROM/source.txt" "$RUN/"
  done
  .venv/bin/python sta_tpo.py --env-id "$ENV_ID" --seed "$SEED" --checkpoint "${CHECKPOINT:-checkpoints/${ENV_ID}__sft}" --output-dir "$RUN" --resume --num-eval-episodes 0 "${FLAGS[@]}"
  .venv/bin/python eval.py --checkpoint "$RUN" --method "STA-TPO, $FORM" --num-envs 6 --num-eval-episodes "${EPISODES:-200}"
done
