"""Options and an overlay with which the recipe runs on the embedded corpus in seconds."""

from pathlib import Path

REPO = Path(__file__).parents[2]
RECIPE = REPO / "egs2/librispeech_100_kv/asr1"

# small enough to train in seconds; nothing here is expected to learn
TINY = {
    "encoder_conf": {"output_size": 16, "attention_heads": 2, "num_blocks": 1, "linear_units": 16},
    "decoder_conf": {"attention_heads": 2, "linear_units": 16, "num_blocks": 1},
    "frontend_conf": {"n_mels": 20, "hop_length": 256},
    "num_workers": 0,
    "batch_bins": 400000,
    "accum_grad": 1,
    "max_epoch": 2,
    "keep_nbest_models": 2,
    "use_amp": False,
    "use_matplotlib": False,
}
SIZES = [
    "--synth_train",
    "16",
    "--synth_dev",
    "2",
    "--synth_test",
    "3",
    "--nbpe",
    "60",
    "--nj",
    "2",
]
