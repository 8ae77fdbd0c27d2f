#!/usr/bin/env bash
# The policy of benchmark/cpu_ipi.sh was trained on light meshes. Here it is evaluated on the
# Panda's original visual meshes, and both results are compared.
set -euo pipefail
cd "$(dirname "$0")/.."
# Idle OpenMP threads must not take the cores from the env processes.
export OMP_WAIT_POLICY=PASSIVE
RUN=runs/PickCube-v1__sta_ppo__1__ipi
FULL=${RUN}__full_meshes
.venv/bin/python eval.py --checkpoint "$RUN" --full-meshes --method full --output-dir "$FULL"
.venv/bin/python eval.py --compare "$RUN/results.json" "$FULL/results.json"
