#!/usr/bin/env bash
# LibriSpeech-100 with small KV caches. `./run.sh --help` lists the options.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
. ./path.sh
. ./cmd.sh
. ./db.sh

corpus=librispeech_100
use_streaming=false
convert_from=
options=("$@")
for ((i = 0; i + 1 < $#; i++)); do
    case "${options[i]}" in
        --corpus) corpus=${options[i + 1]} ;;
        --use_streaming) use_streaming=${options[i + 1]} ;;
        --convert_from) convert_from=${options[i + 1]} ;;
    esac
done

if [ -f ../../TEMPLATE/asr1/asr.sh ] && [ "${corpus}" = librispeech_100 ] && [ -z "${convert_from}" ]; then
    . ./local/espnet_checkout.sh
fi

# What suits a corpus; options on the command line come later and win.
defaults=()
case "${corpus}" in
    synth)
        defaults=(--nbpe 64 --speed_perturb_factors "" --overlay conf/overlays/small.yaml
            --lm_config conf/train_lm_small.yaml)
        [ "${use_streaming}" = true ] || defaults+=(--inference_config conf/decode_asr_fast.yaml) ;;
    mini_librispeech)
        defaults=(--nbpe 1000) ;;
esac
exec ./kv_asr.sh "${defaults[@]}" "$@"
