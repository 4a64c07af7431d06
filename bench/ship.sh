#!/usr/bin/env bash
# checkpoints/ in fp16 from out/MODEL/model.pt, and assets/demo.npz: 2,048 cells of the DDPM. Some minutes.
set -euo pipefail
cd "$(dirname "$0")/.."
. bench/run.sh

step "$PYTHON" -m bench.report ship "$OUT"
