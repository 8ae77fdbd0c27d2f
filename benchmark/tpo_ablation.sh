#!/usr/bin/env bash
# Plain TPO (whole-trajectory pairs) on the same roll-outs as STA-TPO, after benchmark/cpu_ipi.sh: 4 epochs, about as many updates.
set -euo pipefail
cd "$(dirname "$0")/.."
export OMP_WAIT_POLICY=PASSIVE
SFT=runs/PickCube-v1__sft__1__ipi STA=runs/PickCube-v1__sta_tpo__1__ipi PLAIN=runs/PickCube-v1__tpo__1__ablation
mkdir -p "$PLAIN"
cp -r "$STA/rollouts" "$STA/source.txt" "$PLAIN/"
.venv/bin/python sta_tpo.py --no-stage-aware --num-epochs 4 --resume --checkpoint "$SFT" --output-dir "$PLAIN" --num-eval-episodes 0
.venv/bin/python eval.py --checkpoint "$PLAIN" --num-eval-episodes 300
.venv/bin/python eval.py --compare "$PLAIN/results.json" "$STA/results.json"
