#!/usr/bin/env bash
# LibriSpeech-100 with small KV caches. `./run.sh --help` lists the options.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
. ./path.sh
. ./cmd.sh
. ./db.sh

corpus=$(option_value corpus librispeech_100 "$@")

# What suits a corpus; options on the command line come later and win.
defaults=()
case "${corpus}" in
    synth)
        defaults=(--nbpe 200 --speed_perturb_factors "" --overlay conf/overlays/small.yaml
            --inference_config conf/decode_asr_fast.yaml --lm_config conf/train_lm_small.yaml) ;;
    mini_librispeech)
        defaults=(--nbpe 1000) ;;
esac

if [ -f ../../TEMPLATE/asr1/asr.sh ] && [ "${corpus}" = librispeech_100 ]; then
    # inside an ESPnet checkout its own asr.sh drives the stages, with our classes registered
    exec ./asr.sh --python "${python} -m espnet_kv" --lang en --nbpe 5000 \
        --train_set train_clean_100 --valid_set dev \
        --test_sets "test_clean test_other dev_clean dev_other" \
        --speed_perturb_factors "0.9 1.0 1.1" --use_lm false --max_wav_duration 30 \
        --asr_config conf/train_asr_conformer_mha.yaml --inference_config conf/decode_asr.yaml \
        --lm_train_text data/train_clean_100/text --bpe_train_text data/train_clean_100/text "$@"
fi
exec ./kv_asr.sh "${defaults[@]}" "$@"
