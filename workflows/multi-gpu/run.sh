#!/bin/bash
# run.sh OUTPUT_FOLDER SLIDE...    every GPU of this machine, one stream over all slides
set -euo pipefail

if [ $# -lt 2 ]; then
  echo "usage: $0 OUTPUT_FOLDER SLIDE..." >&2
  exit 2
fi
output=$1
shift

# One process per GPU, each seeing its own device alone; GPUS=0,2 takes some of them.
exec tilepipe run "$@" -o "$output" --job "$(dirname "$0")/job.toml" --gpus "${GPUS:-all}"
