#!/usr/bin/env bash
# Run a toolkit's own commands on tiny models and compare the checkpoints they leave:
#     tests/toolkits/run.sh [--quick] NAME [FOLDER]
# NAME is axolotl, llamafactory, llamafactory-4, trl-old, trl-mid or trl-latest. FOLDER keeps the environments, so that
# only the first run installs anything (minutes); default: kappatune-toolkits in the cache folder. Without a GPU, have
# pip find PyTorch's CPU build: it spares the gigabytes of CUDA. With --quick TRL's leave out the tests and record
# nothing, and trl-here runs in the environment that is active.
set -euo pipefail

quick=
[ "${1:-}" != --quick ] || { quick=yes; shift; }
name=${1:?usage: run.sh [--quick] NAME [FOLDER]}
here=$(cd "$(dirname "$0")" && pwd)
folder=${2:-${KAPPATUNE_TOOLKITS:-${XDG_CACHE_HOME:-$HOME/.cache}/kappatune-toolkits}}
script=$here/${name%%-*}.sh
[ -f "$script" ] && [ "$name" != run ] || { echo "no toolkit is called '$name'" >&2; exit 2; }
. "$here/common.sh"
. "$script"
[ "$quick" ] || python "$here/results.py" "$name" "$work/tests.xml"
