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

array=$(sbatch --parsable --export=ALL --array="0-$((shares - 1))" "$here/array.sbatch" "${@:4}")
# afterany, not afterok: finish also does what a failed task has left.
sbatch --parsable --export=ALL --dependency="afterany:${array%%;*}" "$here/finish.sbatch"
