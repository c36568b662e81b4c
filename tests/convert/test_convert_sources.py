"""Convertible models are loaded as kv_* models with the same outputs; others are refused."""

import re
from pathlib import Path

import pytest
import torch
import yaml
from small_sources import ENCODERS, SELFATTN, STREAMING, Experiment, outputs

from espnet_kv.convert.source import PARTS, load_source
from espnet_kv.errors import UserError

SOURCES = {
    **{name: (name, {}) for name in ENCODERS},
    **{f"{name}-selfattn": (name, conf) for name, conf in SELFATTN.items()},
    "conformer-zero_triu": ("conformer", {"zero_triu": True}),
    "branchformer-some-blocks": (
        "branchformer",
        {"merge_method": "fixed_ave", "cgmlp_weight": [1.0, 0.5]},
    ),
    **{f"kv_{name}": (f"kv_{name}", STREAMING) for name in ENCODERS},
    "kv_conformer-cache-input": (
        "kv_conformer",
        STREAMING | {"attention_conf": {"cache": "input"}},
    ),
}


def load(source: Experiment, parts=tuple(PARTS)):
    return load_source(source.folder / "config.yaml", source.folder / "valid.acc.ave.pth", parts)


@pytest.mark.parametrize(("encoder", "conf"), SOURCES.values(), ids=SOURCES)
def test_a_source_is_loaded_as_kv_model_with_the_same_outputs(encoder, conf, tmp_path):
    source = Experiment(tmp_path / "exp", encoder, conf)
    model, config = load(source)
    assert config["encoder"] == "kv_" + encoder.removeprefix("kv_")
    assert config["decoder"] == "kv_transformer"
    expected = outputs(source.model)
    for module, got in outputs(model).items():
        torch.testing.assert_close(got, expected[module], rtol=1e-5, atol=1e-5)


def test_other_modules_keep_their_class(tmp_path):
    source = Experiment(tmp_path / "exp", "conformer", {"rel_pos_type": "legacy"})
    model, config = load(source, ("decoder_cross",))
    assert (config["encoder"], config["decoder"]) == ("conformer", "kv_transformer")
    assert type(model.encoder) is type(source.model.encoder)
    _, config = load(Experiment(tmp_path / "other", "conformer"), ("encoder",))
    assert (config["encoder"], config["decoder"]) == ("kv_conformer", "transformer")


REFUSED = {
    "legacy": ("conformer", {"rel_pos_type": "legacy"}, {}, r"rel_pos_type: legacy.*another query"),
    "legacy-kv": ("kv_conformer", {"rel_pos_type": "legacy"}, {}, r"rel_pos_type: legacy"),
    "fast": (
        "branchformer",
        {"attention_layer_type": "fast_selfattn", "pos_enc_layer_type": "abs_pos"},
        {},
        r"attention_layer_type: fast_selfattn is not softmax attention",
    ),
    "no-attention": ("branchformer", {"use_attn": False}, {}, "no block has attention"),
    "converted": (
        "kv_conformer",
        {"attention_type": "mla", "attention_conf": {"kv_rank": 4}},
        {},
        "attention_type: mla: only mha can be converted",
    ),
    "adapter": ("conformer", {}, {"use_adapter": True}, "use_adapter: true"),
}


@pytest.mark.parametrize(("encoder", "conf", "changes", "message"), REFUSED.values(), ids=REFUSED)
def test_refusals_give_the_reason(encoder, conf, changes, message, tmp_path):
    source = Experiment(tmp_path / "exp", encoder, conf)
    change(source.folder, **changes)
    refused(source, message, ("encoder",))


@pytest.mark.parametrize(
    ("changes", "parts", "message"),
    [
        (
            {"encoder": "contextual_block_conformer"},
            ("encoder",),
            r"encoder: contextual_block.*kv_",
        ),
        ({"decoder": "rnn"}, ("decoder_self",), r"decoder: rnn cannot be converted.*transformer"),
        ({"encoder": None}, ("encoder",), "names no encoder"),
        ({"bpemodel": "no/bpe.model"}, ("encoder",), r"bpemodel: no/bpe.model was found neither"),
    ],
    ids=["encoder", "decoder", "none", "bpe"],
)
def test_unusable_configs_are_refused(changes, parts, message, tmp_path):
    source = Experiment(tmp_path / "exp", "conformer")
    change(source.folder, **changes)
    refused(source, message, parts)


def test_a_model_without_decoder_is_refused_for_decoder_parts(tmp_path):
    source = Experiment(tmp_path / "exp", "conformer", model_conf={"ctc_weight": 1.0})
    refused(source, "ctc_weight: 1.0: the model has no decoder", ("decoder_cross",))
    assert load(source, ("encoder",))[0].decoder is None


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    source = Experiment(tmp_path / "exp", "conformer")
    other = Experiment(tmp_path / "other", "conformer", {"num_blocks": 1})
    torch.save(other.model.state_dict(), source.folder / "valid.acc.ave.pth")
    refused(source, "missing keys: encoder.encoders.1", ("encoder",))
    (source.folder / "valid.acc.ave.pth").unlink()
    refused(source, "valid.acc.ave.pth does not exist", ("encoder",))


def test_paths_are_found_from_another_directory(tmp_path, monkeypatch):
    """ESPnet writes paths relative to the recipe directory."""
    source = Experiment(tmp_path / "asr1/exp/asr_x", "conformer")
    stats = tmp_path / "asr1/exp/asr_stats/feats_stats.npz"
    stats.parent.mkdir()
    (source.folder / "feats_stats.npz").rename(stats)
    tokens = yaml.safe_load((source.folder / "config.yaml").read_text())["token_list"]
    (tmp_path / "asr1/tokens.txt").write_text("".join(f"{token}\n" for token in tokens))
    change(
        source.folder,
        normalize_conf={"stats_file": "exp/asr_stats/feats_stats.npz"},
        token_list="tokens.txt",
    )
    monkeypatch.chdir(tmp_path)
    _, config = load(source)
    assert Path(config["normalize_conf"]["stats_file"]).samefile(stats)
    assert config["token_list"] == tokens


def change(folder: Path, **changes) -> None:
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump(yaml.safe_load(file.read_text()) | changes))


def refused(source: Experiment, message: str, parts: tuple[str, ...]) -> None:
    with pytest.raises(UserError) as caught:
        load(source, parts)
    assert re.search(message, str(caught.value)), caught.value
    assert "\n" not in str(caught.value)
