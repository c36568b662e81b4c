# What starts the recipe's work: empty runs it here; with a cluster put its launcher in front,
# e.g. kv_cmd="srun --gres=gpu:1 --cpus-per-task=8". An ESPnet checkout brings its own cmd.sh.
export kv_cmd="${kv_cmd:-}"
if [ -f ../../TEMPLATE/asr1/cmd.sh ]; then
    . ../../TEMPLATE/asr1/cmd.sh
fi
