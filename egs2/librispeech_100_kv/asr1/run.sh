#!/usr/bin/env bash
# LibriSpeech-100 with small KV caches. `./run.sh --help` lists the options. Inside an ESPnet
# checkout its asr.sh drives stages 1 to 13.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
. ./local/environment.sh
[ -z "${template}" ] || exec "${python}" -m espnet_kv.recipe.checkout "${template}" "$@"
exec ./kv_asr.sh "$@"
