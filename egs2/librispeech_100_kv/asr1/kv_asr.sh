#!/usr/bin/env bash
# Drives the stages without Kaldi and without an ESPnet checkout; the work is in espnet_kv.recipe.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
. ./local/environment.sh

# kv_cmd is a launcher and its options, split into words
exec ${kv_cmd:-} "${python}" -m espnet_kv.recipe "$@"
