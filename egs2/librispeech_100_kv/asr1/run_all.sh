#!/usr/bin/env bash
# The eight models, 2 encoders x 4 attentions: trained, decoded, scored. Options go to run.sh.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
exec ./run.sh --asr_config "$(echo conf/train_asr_{conformer,branchformer}_{mha,gqa,mla,linear}.yaml)" "$@"
