#!/usr/bin/env bash
# The first seed of README's and docs/results.md's numbers of PickCube-v1, row ipi: ./ipi.sh from an empty clone on two CPU cores, with the wall-clock time.
# Resumable: start it again and it goes on. The log is committed as reference_output/cpu_ipi.txt.
set -euo pipefail
cd "$(dirname "$0")/.."
mkdir -p reference_output
{
  echo "commit $(git rev-parse --short HEAD), $(nproc) cores, $(date -u +%FT%TZ)"
  time ./ipi.sh "${1:-PickCube-v1}"
} 2>&1 | tee -a reference_output/cpu_ipi.txt
