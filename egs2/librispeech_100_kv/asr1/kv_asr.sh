#!/usr/bin/env bash
# Drives the stages without Kaldi and without an ESPnet checkout; the work is in espnet_kv.recipe.
set -euo pipefail
. ./path.sh
. ./db.sh

exec ${kv_cmd:-} ${python} -m espnet_kv.recipe "$@"
