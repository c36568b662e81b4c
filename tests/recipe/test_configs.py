"""conf/: every file builds, and files differ only where they say."""

import argparse
import functools
from pathlib import Path
from typing import Any

import pytest
import torch

from espnet_kv.attention import attention_like
from espnet_kv.config import load_config, load_yaml
from espnet_kv.errors import UserError
from espnet_kv.espnet.task import ASRTask

CONF = Path(__file__).parents[2] / "conf"
OVERLAY = CONF / "overlays/small.yaml"
ENCODERS = ("conformer", "branchformer")
ATTENTIONS = ("mha", "gqa", "mla", "linear")
MAIN = {(e, a): CONF / f"train_asr_{e}_{a}.yaml" for e in ENCODERS for a in ATTENTIONS}
WHISPER = sorted((CONF / "tuning").glob("train_asr_whisper_*.yaml"))
TUNING = sorted({*(CONF / "tuning").glob("train_asr_*.yaml")} - {*WHISPER})
TOKENS = ["<blank>", "<unk>", "A", "B", "<sos/eos>"]
encoders = pytest.mark.parametrize("encoder", ENCODERS)
every_config = pytest.mark.parametrize(
    "path", [*MAIN.values(), *TUNING], ids=lambda p: str(p.relative_to(CONF))
)


@functools.cache
def defaults() -> dict[str, Any]:
    return ASRTask.get_default_config()


def build(config: dict[str, Any]) -> torch.nn.Module:
    """The model as ESPnet's training builds it; keys that ESPnet does not know are an error."""
    assert not set(config) - set(defaults())
    return ASRTask.build_model(argparse.Namespace(**defaults() | config | {"token_list": TOKENS}))


def size(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def differences(a: Any, b: Any, path: str = "") -> set[str]:
    """Dotted names of the keys at which two configurations differ."""
    if not (isinstance(a, dict) and isinstance(b, dict)):
        return set() if a == b else {path}
    return set().union(
        *(differences(a.get(k), b.get(k), f"{path}.{k}".lstrip(".")) for k in a.keys() | b.keys())
    )


def test_the_eight_are_there():
    assert {p.name for p in MAIN.values()} == {p.name for p in CONF.glob("train_asr_*.yaml")}


@pytest.fixture(scope="module")
def full_size() -> dict[Path, tuple[int, int]]:
    """Parameters of the whole model and of its encoder, filled by the test of building."""
    return {}


@every_config
def test_it_builds(path, full_size):
    config = load_yaml(path)
    model = build(config)
    full_size[path] = size(model), size(model.encoder)
    conf = config["encoder_conf"]
    assert type(model.encoder).__name__.lower() == config["encoder"].replace("_", "") + "encoder"
    assert len(model.encoder.encoders) == conf["num_blocks"]
    assert model.encoder.dynamic_chunk_training is conf["dynamic_chunk_training"]
    attention = getattr(model.encoder.encoders[0], model.encoder.attention_slot)
    for key, value in conf.get("attention_conf", {}).items():
        if key == "kv_rank" and isinstance(value, float):
            value = value * conf["output_size"]
        assert key == "feature_map" or getattr(attention, key) == value


@every_config
def test_the_small_overlay_fits(path):
    config = load_config(path, OVERLAY)
    small = load_yaml(OVERLAY)
    model = build(config)
    assert model.encoder.output_size() == small["encoder_conf"]["output_size"]
    assert len(model.encoder.encoders) == small["encoder_conf"]["num_blocks"]
    assert size(model) < 3_000_000
    allowed = {f"{k}.{inner}" for k, v in small.items() if isinstance(v, dict) for inner in v}
    allowed |= {k for k, v in small.items() if not isinstance(v, dict)}
    own = small["per_encoder"][config["encoder"]]["encoder_conf"]
    allowed |= {f"encoder_conf.{key}" for key in own}
    assert differences(load_yaml(path), config) <= allowed


@encoders
@pytest.mark.parametrize("overlay", [None, OVERLAY], ids=["full", "small"])
def test_the_four_of_an_encoder_differ_in_attention_only(encoder, overlay):
    configs = [load_config(MAIN[encoder, attention], overlay) for attention in ATTENTIONS]
    for config, attention in zip(configs, ATTENTIONS, strict=True):
        assert config["encoder_conf"]["attention_type"] == attention
        changed = differences(configs[0], config)
        assert changed <= {"encoder_conf.attention_type", "encoder_conf.attention_conf"}


@encoders
@pytest.mark.parametrize("overlay", [None, "small", "medium"])
def test_the_caches_have_one_ratio_at_every_size(encoder, overlay):
    """A frame of mla takes an eighth of mha's bytes, and one of gqa half of them."""
    file = CONF / f"overlays/{overlay}.yaml" if overlay else None
    numbers = {}
    for attention in ("mha", "gqa", "mla"):
        conf = load_config(MAIN[encoder, attention], file)["encoder_conf"]
        module = attention_like(
            attention, conf.get("attention_conf", {}), conf["attention_heads"], conf["output_size"]
        )
        numbers[attention] = sum(heads * size for heads, size in module.footprint.frame)
    assert numbers["mha"] == 2 * numbers["gqa"] == 8 * numbers["mla"]


@encoders
def test_the_two_encoders_share_everything_else(encoder):
    changed = differences(load_yaml(MAIN["conformer", "mha"]), load_yaml(MAIN[encoder, "mha"]))
    assert {key.split(".")[0] for key in changed} <= {"encoder", "encoder_conf"}


@pytest.mark.parametrize(("encoder", "attention"), MAIN, ids="-".join)
def test_values_are_those_of_librispeech_100(encoder, attention):
    config = load_yaml(MAIN[encoder, attention])
    conf = config["encoder_conf"]
    kernel = {"conformer": "cnn_module_kernel", "branchformer": "cgmlp_conv_kernel"}[encoder]
    assert config["encoder"] == f"kv_{encoder}"
    assert (conf["num_blocks"], conf["output_size"], conf["attention_heads"]) == (12, 256, 4)
    assert (conf[kernel], conf["input_layer"]) == (31, "conv2d")
    assert (conf["causal"], conf["dynamic_chunk_training"]) == (True, True)
    if encoder == "conformer":
        assert conf["linear_units"] == 1024
    decoder = config["decoder_conf"]
    assert config["decoder"] == "transformer"
    assert (decoder["num_blocks"], decoder["linear_units"]) == (6, 2048)
    assert config["model_conf"]["ctc_weight"] == 0.3
    assert (config["max_epoch"], config["batch_bins"], config["accum_grad"]) == (70, 16_000_000, 4)
    assert config["use_amp"] is True
    assert (config["optim"], config["optim_conf"]["lr"]) == ("adam", 0.002)
    assert (config["scheduler"], config["scheduler_conf"]) == ("warmuplr", {"warmup_steps": 15000})


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_the_two_encoders_are_of_one_size(attention, full_size):
    paths = [MAIN[encoder, attention] for encoder in ENCODERS]
    if not all(path in full_size for path in paths):  # this test was picked alone
        for path in paths:
            model = build(load_yaml(path))
            full_size[path] = size(model), size(model.encoder)
    for counts in zip(*(full_size[path] for path in paths), strict=True):
        assert max(counts) / min(counts) < 1.05


CONFORMER = "encoder_conf.attention_conf"
OFFLINE = {"encoder_conf.causal", "encoder_conf.dynamic_chunk_training"}
ABLATIONS: dict[str, tuple[str, set[str], dict[str, Any]]] = {
    **{
        f"conformer_mla_r{r}": ("conformer_mla", {f"{CONFORMER}.kv_rank"}, {"kv_rank": r})
        for r in (128, 64, 48, 32)
    },
    "conformer_mla_kaldi_fbank": (
        "conformer_mla",
        {"frontend", "frontend_conf.n_fft"},
        {"kv_rank": 0.25},
    ),
    "conformer_mqa": ("conformer_gqa", {f"{CONFORMER}.num_kv_heads"}, {"num_kv_heads": 1}),
    "conformer_mha_offline": ("conformer_mha", OFFLINE, {}),
    "conformer_mla_offline": ("conformer_mla", OFFLINE, {"kv_rank": 0.25}),
    **{
        f"e_branchformer_{a}": ("tuning/e_branchformer_mha", {"encoder_conf.attention_type"}, {})
        for a in ATTENTIONS
    },
}


def config_file(name: str) -> Path:
    folder, _, name = name.rpartition("/")
    return CONF / folder / f"train_asr_{name}.yaml"


@pytest.mark.parametrize("name", [p.stem.removeprefix("train_asr_") for p in TUNING])
def test_an_ablation_differs_only_where_it_says(name):
    base, allowed, values = ABLATIONS[name]
    config = load_yaml(config_file(f"tuning/{name}"))
    changed = differences(load_yaml(config_file(base)), config)
    if name.startswith("e_branchformer"):
        allowed = allowed | {CONFORMER}
        assert config["encoder_conf"]["attention_type"] == name.rsplit("_", 1)[1]
    assert changed <= allowed
    assert changed or name == "e_branchformer_mha"
    for key, value in values.items():
        assert config["encoder_conf"]["attention_conf"][key] == value
    if name.endswith("offline"):
        assert not config["encoder_conf"]["causal"]
        assert not config["encoder_conf"]["dynamic_chunk_training"]


def test_every_ablation_is_there():
    assert {p.stem.removeprefix("train_asr_") for p in TUNING} == set(ABLATIONS)


def test_whispers_differ_in_size_and_without_training_in_padding():
    """test_whisper_recipe.py trains and decodes with them."""
    names = [path.stem.removeprefix("train_asr_whisper_") for path in WHISPER]
    assert names == ["base_finetune", "small_finetune", "tiny_finetune", "zero_shot"]
    model = {f"{part}_conf.whisper_model" for part in ("encoder", "decoder")}
    tiny, zero_shot = (load_yaml(config_file(f"tuning/whisper_{n}")) for n in names[2:])
    for path in WHISPER[:2]:
        assert differences(tiny, load_yaml(path)) == model
    augmentation = {"encoder_conf.use_specaug", "encoder_conf.specaug_conf"}
    padding = {"encoder_conf.do_pad_trim", "max_epoch"}
    assert differences(tiny, zero_shot) == padding | augmentation
    assert zero_shot["encoder_conf"]["do_pad_trim"] and zero_shot["max_epoch"] == 0
    for config in map(load_yaml, WHISPER):
        assert not set(config) - set(defaults())
        assert config["encoder_conf"]["whisper_model"] == config["decoder_conf"]["whisper_model"]


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (None, "does not exist"),
        ("- a\n- b\n", "expected keys and values"),
        ("a: [1\n", "is not a YAML file"),
        ("", "expected keys and values"),
    ],
    ids=["missing", "list", "broken", "empty"],
)
def test_a_bad_file_is_named(content, told, tmp_path):
    path = tmp_path / "train.yaml"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=rf"{path}.*{told}"):
        load_config(path)
    with pytest.raises(UserError, match=rf"{path}.*{told}"):
        load_config(MAIN["conformer", "mha"], path)


def test_per_encoder_must_be_a_mapping(tmp_path):
    for content in ("per_encoder: [kv_conformer]\n", "per_encoder: {kv_conformer: 3}\n"):
        path = tmp_path / "overlay.yaml"
        path.write_text(content)
        with pytest.raises(UserError, match=r"overlay\.yaml.*per_encoder"):
            load_config(MAIN["conformer", "mha"], path)


def test_an_overlay_reaches_into_mappings(tmp_path):
    path = tmp_path / "overlay.yaml"
    path.write_text("seed: 1\noptim_conf: {lr: 1.0}\npatience: 3\nencoder_conf: {num_blocks: 1}\n")
    base = load_yaml(MAIN["conformer", "mla"])
    merged = load_config(MAIN["conformer", "mla"], path)
    changed = {"seed", "optim_conf.lr", "patience", "encoder_conf.num_blocks"}
    assert differences(base, merged) == changed
    assert load_yaml(MAIN["conformer", "mla"]) == base
