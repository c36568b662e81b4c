# Sourced by run.sh inside an ESPnet checkout: its asr.sh drives stages 1 to 13, with our classes
# registered through --python, and our own driver those after them. Links what asr.sh expects
# beside it, as ESPnet's setup.sh would.
last_of_asr_sh=13
for name in asr.sh scripts pyscripts; do
    [ -e "${name}" ] || ln -s "../../TEMPLATE/asr1/${name}" "${name}"
done
for name in steps utils; do
    [ -e "${name}" ] || ln -s "../../../tools/kaldi/egs/wsj/s5/${name}" "${name}"
done

stage=1
stop_stage=99
passed=()
ours=() # no options of asr.sh
while [ $# -gt 0 ]; do
    if [ $# -eq 1 ] && [[ "$1" == --* ]] && [ "$1" != --help ]; then
        echo "error: $1 needs a value" >&2
        exit 1
    fi
    case "$1" in
        --stage) stage=$2; shift ;;
        --stop_stage) stop_stage=$2; shift ;;
        --corpus) shift ;; # the one corpus here
        --profile_args) ours+=("$1" "$2"); shift ;;
        *) passed+=("$1") ;;
    esac
    shift
done

decode=conf/decode_asr.yaml
if [ "${use_streaming}" = true ]; then # python -m espnet_kv puts our streaming command to work
    decode=conf/decode_asr_streaming.yaml
fi

[ "${stage}" -gt "${last_of_asr_sh}" ] || ./asr.sh \
    --stage "${stage}" \
    --stop_stage "$((stop_stage < last_of_asr_sh ? stop_stage : last_of_asr_sh))" \
    --python "${python} -m espnet_kv" \
    --lang en \
    --nbpe 5000 \
    --max_wav_duration 30 \
    --speed_perturb_factors "0.9 1.0 1.1" \
    --use_lm false \
    --train_set train_clean_100 \
    --valid_set dev \
    --test_sets "test_clean test_other dev_clean dev_other" \
    --asr_config conf/train_asr_conformer_mha.yaml \
    --inference_config "${decode}" \
    --lm_train_text data/train_clean_100/text \
    --bpe_train_text data/train_clean_100/text \
    ${passed[@]+"${passed[@]}"}

[ "${stop_stage}" -gt "${last_of_asr_sh}" ] || exit 0
[ "${stop_stage}" = 99 ] || ours+=(--stop_stage "${stop_stage}")
exec ./kv_asr.sh \
    --stage "$((stage > last_of_asr_sh ? stage : last_of_asr_sh + 1))" ${passed[@]+"${passed[@]}"} \
    ${ours[@]+"${ours[@]}"}
