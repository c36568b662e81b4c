# What starts the recipe's work: empty runs it here; with a cluster put its launcher in front,
# e.g. train_cmd="srun --gres=gpu:1 --cpus-per-task=8".
export train_cmd=
