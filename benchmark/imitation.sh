#!/usr/bin/env bash
# Variants of imitation on one task, on 200 development episodes. DEV_SEED (7) is their seed.
#   benchmark/imitation.sh ENV_ID "FLAGS OF SFT.PY" ["OTHER FLAGS" ...]
# The variants in LOG.md, of StackCube-v1:
#   2026-11-29  "--vla tiny --image-shift 0" "--vla tiny --image-shift 4" "--vla tiny --image-shift 10"
#   2026-11-30  "--vla tiny" "--vla base" "--vla base --learning-rate 3e-4"
#   2026-11-30  "--demo-noise 0.1 --demo-slip 0.02" "--demo-noise 0.25 --demo-slip 0.05"
# and of PickCube-v1 the last two. Until then noise 0.1 and slip 0.02 were the defaults.
# A stopped run goes on.
set -euo pipefail
cd "$(dirname "$0")/.."
# Idle OpenMP threads must not take the cores from the env processes.
export OMP_WAIT_POLICY=PASSIVE
ENV_ID=$1
DEV_SEED=${DEV_SEED:-7}
RESULTS=()
for FLAGS in "${@:2}"; do
  RUN=runs/${ENV_ID}__sft__1__${FLAGS//[^a-z0-9.]/}
  # The seed and the --demo flags decide the demonstrations.
  .venv/bin/python sft.py --env-id "$ENV_ID" --seed 1 --output-dir "$RUN" --resume \
    --num-eval-episodes 0 $FLAGS
  .venv/bin/python eval.py --checkpoint "$RUN" --seed "$DEV_SEED" --num-eval-episodes 200 \
    --output-dir "$RUN/dev$DEV_SEED"
  RESULTS+=("$RUN/dev$DEV_SEED/results.json")
done
.venv/bin/python eval.py --compare "${RESULTS[@]}"
