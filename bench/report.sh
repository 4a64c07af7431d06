#!/usr/bin/env bash
# Only the table, of all runs in out or of those that are named, and the pictures. About a minute.
set -euo pipefail
cd "$(dirname "$0")/.."
. bench/run.sh

report "$@"
pictures
