# What starts the recipe's work: empty runs it here; with a cluster put its launcher in front,
# e.g. kv_cmd="srun --gres=gpu:1 --cpus-per-task=8". ESPnet's asr.sh goes by the cmd.sh of its
# checkout.
export kv_cmd="${kv_cmd:-}"
if [ -f "${PWD%/*/*}/TEMPLATE/asr1/cmd.sh" ]; then
    . "${PWD%/*/*}/TEMPLATE/asr1/cmd.sh"
fi
