#!/usr/bin/env bash
# The policy of benchmark/cpu_ipi.sh under the Panda's original visual meshes, compared with the light ones that it was trained on.
set -euo pipefail
cd "$(dirname "$0")/.."
export OMP_WAIT_POLICY=PASSIVE
RUN=runs/PickCube-v1__sta_ppo__1__ipi
.venv/bin/python eval.py --checkpoint "$RUN" --full-meshes --method full --output-dir "${RUN}__full_meshes"
.venv/bin/python eval.py --compare "$RUN/results.json" "${RUN}__full_meshes/results.json"
