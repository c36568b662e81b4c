#!/usr/bin/env bash
# Stage 1 for ESPnet's asr.sh: data/train_clean_100, data/dev and the test sets.
set -euo pipefail
. ./local/environment.sh
exec "${python}" -m espnet_kv.recipe --stage 1 --stop_stage 1 "$@"
