#!/usr/bin/env bash
# Imitation alone on each task, from 200 demonstrations by the scripted expert.
#   SEEDS="1 2 3" benchmark/sft_all.sh [ENV_ID ...]
# A run with a results.json is left as it is, and a stopped run goes on. `python benchmark/tables.py
# runs/*__200` adds the results to docs/sft.jsonl.
set -euo pipefail
cd "$(dirname "$0")/.."
# Idle OpenMP threads must not take the cores from the env processes.
export OMP_WAIT_POLICY=PASSIVE
ALL="StackCube-v1 LiftPegUpright-v1 PutCarrotOnPlateInScene-v1 PushCube-v1 PlaceSphere-v1
  PutSpoonOnTableClothInScene-v1 PullCube-v1 StackGreenCubeOnYellowCubeBakedTexInScene-v1
  PegInsertionSide-v1 PutEggplantInBasketScene-v1 PickCube-v1"
for SEED in ${SEEDS:-1 2 3}; do
  for ENV_ID in ${*:-$ALL}; do
    RUN=runs/${ENV_ID}__sft__${SEED}__200
    [ -f "$RUN/results.json" ] && continue
    .venv/bin/python sft.py --env-id "$ENV_ID" --seed "$SEED" --vla tiny --image-shift 0 \
      --output-dir "$RUN" --resume --num-demos 200 --demo-speed 0.6 --demo-pause 0 --num-updates 1000 --num-eval-episodes 0
    .venv/bin/python eval.py --checkpoint "$RUN" --num-eval-episodes 100 --capture-video
  done
done
