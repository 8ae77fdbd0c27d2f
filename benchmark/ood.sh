#!/usr/bin/env bash
# Policies of benchmark/sft_all.sh out of distribution and in other words.
#   benchmark/ood.sh [ENV_ID ...]
set -euo pipefail
cd "$(dirname "$0")/.."
# Idle OpenMP threads must not take the cores from the env processes.
export OMP_WAIT_POLICY=PASSIVE
for ENV_ID in ${*:-PickCube-v1 StackCube-v1 LiftPegUpright-v1}; do
  RUN=runs/${ENV_ID}__sft__1__200
  for OOD in position camera lighting; do
    [ -f "$RUN/results_$OOD.json" ] || .venv/bin/python eval.py --checkpoint "$RUN" --ood $OOD
  done
  [ -f "$RUN/results_other_words.json" ] ||
    .venv/bin/python eval.py --checkpoint "$RUN" --instruction-set paraphrase
done
