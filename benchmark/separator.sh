#!/usr/bin/env bash
# How the learned separator compares with the rules, on greedy episodes of four SFT policies. Three
# of them are shipped, and a small one of PushCube-v1 is trained here.
# A stopped script goes on where it was. The rows go to docs/separator.jsonl. Afterwards,
# `python benchmark/tables.py` writes the table of docs/sft.md.
set -euo pipefail
cd "$(dirname "$0")/.."
# Idle OpenMP threads must not take the cores from the env processes.
export OMP_WAIT_POLICY=PASSIVE
PYTHON=${PYTHON:-.venv/bin/python}
PUSH=runs/PushCube-v1__sft__1__separator
[ -d "$PUSH/checkpoint" ] ||
  "$PYTHON" sft.py --env-id PushCube-v1 --vla tiny --output-dir "$PUSH" --num-demos 60 --num-updates 400 \
    --num-eval-episodes 0
for CHECKPOINT in checkpoints/{StackCube-v1,LiftPegUpright-v1,PickCube-v1}__sft "$PUSH"; do
  OUT=runs/separator/$(basename "$CHECKPOINT")
  # What the evaluation prints must not be among the rows.
  [ -f "$OUT/results.json" ] ||
    "$PYTHON" eval.py --checkpoint "$CHECKPOINT" --num-eval-episodes 40 --num-envs 8 \
      --output-dir "$OUT" >&2
  "$PYTHON" - "$OUT/results.json" <<'END'
import json
import sys

row = json.load(open(sys.argv[1]))
row.pop("episodes")
print(json.dumps(row))
END
done > docs/separator.jsonl.tmp
mv docs/separator.jsonl.tmp docs/separator.jsonl
