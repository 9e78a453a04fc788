#!/bin/bash
# submit.sh SLIDE STORE [SHARES [ARGUMENTS OF tilepipe run...]]
set -euo pipefail

if [ $# -lt 2 ]; then
  echo "usage: $0 SLIDE STORE [SHARES [ARGUMENTS OF tilepipe run...]]" >&2
  exit 2
fi
here=$(cd "$(dirname "$0")" && pwd)
export SLIDE=$1 STORE=$2
shares=${3:-8}
export SHARES=$shares

# The first task makes the store. Locks hold on one node alone, so the others begin a minute after it.
tasks=$(sbatch --parsable --export=ALL --array=0 "$here/array.sbatch" "${@:4}")
tasks=${tasks%%;*}
if [ "$shares" -gt 1 ]; then
  others=$(sbatch --parsable --export=ALL --array="1-$((shares - 1))" --dependency="after:$tasks+1" \
    "$here/array.sbatch" "${@:4}")
  tasks=$tasks:${others%%;*}
fi
# afterany, not afterok: finish also does what a failed task has left.
sbatch --parsable --export=ALL --dependency="afterany:$tasks" "$here/finish.sbatch"
