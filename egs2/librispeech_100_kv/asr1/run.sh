#!/usr/bin/env bash
# LibriSpeech-100 with small KV caches. `./run.sh --help` lists the options.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
. ./path.sh
. ./cmd.sh
. ./db.sh

# --name=value as two words, so that everything below reads options in one way
words=()
for word in "$@"; do
    case "${word}" in
        --*=*) words+=("${word%%=*}" "${word#*=}") ;;
        *) words+=("${word}") ;;
    esac
done
set -- ${words[@]+"${words[@]}"}

# value_of OPTION DEFAULT: what the command line gives an option
value_of() {
    local n value=$2
    for ((n = 0; n + 1 < ${#words[@]}; n++)); do
        [ "${words[n]}" != "$1" ] || value=${words[n + 1]}
    done
    echo "${value}"
}

if [ -f ../../TEMPLATE/asr1/asr.sh ] && [ -z "$(value_of --convert_from "")" ] &&
    [ "$(value_of --corpus librispeech_100)" = librispeech_100 ]; then
    use_streaming=$(value_of --use_streaming false)
    . ./local/espnet_checkout.sh
fi
exec ./kv_asr.sh "$@"
