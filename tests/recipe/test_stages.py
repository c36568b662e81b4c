"""Pieces of the recipe's driver that run.sh tests reach only in their sum."""

import pytest

from espnet_kv.config import load_config
from espnet_kv.errors import UserError
from espnet_kv.recipe.logs import parse_epoch


class TestOverlay:
    def test_lays_keys_over_and_chooses_by_encoder(self, tmp_path):
        base, overlay = tmp_path / "base.yaml", tmp_path / "overlay.yaml"
        base.write_text("encoder: kv_conformer\nencoder_conf: {output_size: 8, num_blocks: 2}\n")
        overlay.write_text(
            "encoder_conf: {output_size: 4}\n"
            "per_encoder: {kv_conformer: {encoder_conf: {linear_units: 3}}, other: {seed: 1}}\n"
        )
        assert load_config(base, overlay) == {
            "encoder": "kv_conformer",
            "encoder_conf": {"output_size": 4, "num_blocks": 2, "linear_units": 3},
        }

    @pytest.mark.parametrize(
        ("text", "said"), [("a: [", "is not a YAML file"), ("- a", "expected keys and values")]
    )
    def test_a_bad_file_is_named(self, tmp_path, text, said):
        file = tmp_path / "bad.yaml"
        file.write_text(text)
        with pytest.raises(UserError, match=f"bad.yaml.*{said}"):
            load_config(file)


def test_the_trainers_epoch_line_is_understood():
    line = (
        "INFO: 12epoch results: [train] iter_time=0.01, loss_ctc=60.3, loss_att=40.0, acc=0.237, "
        "loss=46.140, backward_time=0.3, [valid] loss_ctc=57.4, cer_ctc=0.8, acc=0.418, cer=1.0, "
        "loss=34.968, time=1.9 seconds"
    )
    epoch = parse_epoch(line)
    assert epoch.number == 12
    assert str(epoch) == "train loss 46.140, valid loss 34.968, accuracy 0.418"
    assert not epoch.not_finite()
