#!/usr/bin/env bash
# Imitation with shifted images and without, from the same demonstrations, on development episodes.
#   benchmark/image_shift.sh [ENV_ID]
# A stopped run goes on. LOG.md, 2026-11-29, has StackCube-v1's results.
set -euo pipefail
cd "$(dirname "$0")/.."
# Idle OpenMP threads must not take the cores from the env processes.
export OMP_WAIT_POLICY=PASSIVE
ENV_ID=${1:-StackCube-v1}
RESULTS=()
for SHIFT in 0 4 10; do
  RUN=runs/${ENV_ID}__sft__1__shift$SHIFT
  # The seed decides the demonstrations, so they are the same in each run.
  .venv/bin/python sft.py --env-id "$ENV_ID" --seed 1 --vla tiny --output-dir "$RUN" --resume \
    --image-shift "$SHIFT" --num-eval-episodes 0
  .venv/bin/python eval.py --checkpoint "$RUN" --seed 7 --num-eval-episodes 200
  RESULTS+=("$RUN/results.json")
done
.venv/bin/python eval.py --compare "${RESULTS[@]}"
