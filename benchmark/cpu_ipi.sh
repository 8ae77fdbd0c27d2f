#!/usr/bin/env bash
# ./ipi.sh with its wall-clock time, from an empty clone on two CPU cores. A stopped script goes on
# where it was. The log is committed as reference_output/cpu_ipi.txt. PickCube-v1's budget "ipi" in
# docs/tables.md was made by the same script at an earlier commit (LOG.md).
set -euo pipefail
cd "$(dirname "$0")/.."
mkdir -p reference_output
{
  echo "commit $(git rev-parse --short HEAD), $(nproc) cores, $(date -u +%FT%TZ)"
  time ./ipi.sh "${1:-PickCube-v1}"
} 2>&1 | tee -a reference_output/cpu_ipi.txt
