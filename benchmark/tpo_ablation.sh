#!/usr/bin/env bash
# Plain TPO, whose pairs are of whole trajectories, after benchmark/cpu_ipi.sh. It trains on the
# roll-outs of STA-TPO, with the same cost. 4 epochs give about as many updates.
set -euo pipefail
cd "$(dirname "$0")/.."
# Idle OpenMP threads must not take the cores from the env processes.
export OMP_WAIT_POLICY=PASSIVE
SFT=runs/PickCube-v1__sft__1__ipi
STA=runs/PickCube-v1__sta_tpo__1__ipi
PLAIN=runs/PickCube-v1__tpo__1__ablation
mkdir -p "$PLAIN"
cp -r "$STA/rollouts" "$STA/source.txt" "$PLAIN/"
.venv/bin/python sta_tpo.py --no-stage-aware --cost sum --num-epochs 4 --resume \
  --checkpoint "$SFT" --output-dir "$PLAIN" --num-eval-episodes 0
.venv/bin/python eval.py --checkpoint "$PLAIN" --num-eval-episodes 300
.venv/bin/python eval.py --compare "$PLAIN/results.json" "$STA/results.json"
