"""A checkpoint fills its model or is refused in one message."""

import argparse
import copy
import pickle
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import yaml
from espnet2.tasks.asr import ASRTask as ESPnetASRTask
from espnet2.torch_utils.load_pretrained_model import load_pretrained_model

from espnet_kv.bin import asr_inference
from espnet_kv.decoder.transformer import KVTransformerDecoder
from espnet_kv.errors import UserError
from espnet_kv.espnet.loading import refuse_partial_loads
from espnet_kv.espnet.task import ASRTask, CachedDecodingTask, TrainingTask

ATTENTIONS = {
    "mha": {"attention_type": "mha"},
    "mla": {"attention_type": "mla", "attention_conf": {"kv_rank": 4}},
    "mla8": {"attention_type": "mla", "attention_conf": {"kv_rank": 8}},
    "linear": {"attention_type": "linear"},
}


@pytest.fixture(scope="module")
def experiments(tmp_path_factory) -> Path:
    """NAME/config.yaml and NAME/model.pth for each of ATTENTIONS, random weights."""
    root = tmp_path_factory.mktemp("exp")
    config = ASRTask.get_default_config()
    for name, attention in ATTENTIONS.items():
        config.update(
            token_list=["<blank>", "<unk>", "A", "B", "<sos/eos>"],
            token_type="char",
            frontend_conf={"n_mels": 20},
            encoder="kv_conformer",
            encoder_conf={
                "output_size": 16,
                "attention_heads": 2,
                "linear_units": 16,
                "num_blocks": 2,
                "rel_pos_type": "latest",
                "cnn_module_kernel": 3,
                **attention,
            },
            decoder="transformer",
            decoder_conf={"attention_heads": 2, "linear_units": 16, "num_blocks": 1},
        )
        (root / name).mkdir()
        (root / name / "config.yaml").write_text(yaml.safe_dump(config))
        model = ASRTask.build_model(argparse.Namespace(**config))
        torch.save(model.state_dict(), root / name / "model.pth")
    return root


def load(task: type, experiments: Path, config: str, model: str):
    return task.build_model_from_file(
        experiments / config / "config.yaml", experiments / model / "model.pth", "cpu"
    )[0]


@pytest.mark.parametrize("task", [ASRTask, ESPnetASRTask], ids=["ours", "espnet"])
@pytest.mark.parametrize("name", ATTENTIONS)
def test_a_fitting_checkpoint_loads(task, name, experiments):
    state = torch.load(experiments / name / "model.pth")
    loaded = load(task, experiments, name, name).state_dict()
    assert loaded.keys() == state.keys()
    assert all(torch.equal(loaded[key], state[key]) for key in state)


@pytest.mark.parametrize("task", [ASRTask, ESPnetASRTask], ids=["ours", "espnet"])
@pytest.mark.parametrize(
    ("config", "model", "missing", "unexpected"),
    [
        ("mla", "mha", "linear_kv_down.weight", "linear_v.bias"),
        ("mha", "mla", "linear_k.weight", "linear_k_up.weight"),
        ("linear", "mha", "none", "pos_bias_u"),
        ("mha", "linear", "linear_pos.weight", "none"),
    ],
)
def test_another_attention_is_refused(task, config, model, missing, unexpected, experiments):
    with pytest.raises(UserError) as caught:
        load(task, experiments, config, model)
    message = str(caught.value)
    listed_missing, listed_unexpected = message.split("; unexpected keys: ")
    listed_missing = listed_missing.split("missing keys: ")[1]
    for layer in range(2):  # every key of every layer
        prefix = f"encoder.encoders.{layer}.self_attn."
        assert missing == "none" or prefix + missing in listed_missing.split(", ")
        assert unexpected == "none" or prefix + unexpected in listed_unexpected.split(", ")
    assert (missing == "none") == (listed_missing == "none")
    assert (unexpected == "none") == (listed_unexpected == "none")
    assert "attention_type" in message
    assert "\n" not in message


def test_keys_outside_the_encoder_are_refused_too(experiments, tmp_path):
    state = torch.load(experiments / "mla" / "model.pth")
    del state["decoder.output_layer.bias"]
    state["decoder.extra"] = torch.zeros(1)
    torch.save(state, tmp_path / "model.pth")
    with pytest.raises(
        UserError, match=r"missing keys: decoder.output_layer.bias; .*decoder.extra"
    ):
        ASRTask.build_model_from_file(
            experiments / "mla" / "config.yaml", tmp_path / "model.pth", "cpu"
        )


def test_another_size_is_one_line_with_the_key(experiments):
    with pytest.raises(UserError) as caught:
        load(ASRTask, experiments, "mla", "mla8")
    message = str(caught.value)
    assert message.startswith(str(experiments / "mla8" / "model.pth"))
    assert "encoder.encoders.0.self_attn.linear_kv_down.weight" in message
    assert "encoder.encoders.1.self_attn.linear_v_up.weight" in message
    assert "\n" not in message


CONFIGS = {
    "no token_type": ("token_type", None, "it names no token_type"),
    "no use_preprocessor": ("use_preprocessor", None, "it names no use_preprocessor"),
    "type": ("token_type", "bogus", "token_type: bogus .allowed: bpe, char"),
    "rate": ("frontend_conf", {"fs": -16000}, "frontend_conf.fs: -16000 samples per second"),
    "number": ("token_list", ["<blank>", "<unk>", 7, "B", "<sos/eos>"], "7 is no text"),
    "twice": ("token_list", ["<blank>", "<unk>", "B", "B", "<sos/eos>"], "'B' occurs twice"),
    "unk": ("token_list", ["<blank>", "C", "A", "B", "<sos/eos>"], "there is no <unk>"),
}


@pytest.mark.parametrize(("key", "value", "said"), CONFIGS.values(), ids=CONFIGS)
def test_a_damaged_configuration_is_one_line_with_its_key(key, value, said, experiments, tmp_path):
    config = yaml.safe_load((experiments / "mha/config.yaml").read_text())
    if value is None:
        del config[key]
    else:
        config[key] = value
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(UserError, match=f"config.yaml.*{said}"):
        ASRTask.build_model_from_file(tmp_path / "config.yaml", experiments / "mha/model.pth")


@pytest.mark.parametrize(
    "changes",
    [{"preprocessor": "bogus"}, {"preprocessor_conf": {"bogus": 1}}, {"token_type": "bpe"}],
    ids=["name", "option", "no bpemodel"],
)
def test_a_preprocessor_that_cannot_be_built_is_one_line(changes, experiments):
    config = yaml.safe_load((experiments / "mha/config.yaml").read_text()) | changes
    with pytest.raises(UserError, match="the configuration builds no preprocessor: "):
        ASRTask.build_preprocess_fn(argparse.Namespace(**config), False)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda weight: (weight * 10).to(torch.int8), "has numbers of type int8, not floats"),
        (lambda weight: weight.to(torch.complex64), "has numbers of type complex64"),
        (lambda weight: weight * torch.inf, "holds nan or inf"),
    ],
    ids=["int8", "complex", "inf"],
)
@pytest.mark.parametrize("key", ["ctc.ctc_lo.weight", "normalize.mean"])
def test_a_checkpoint_of_other_numbers_is_refused(key, change, said, experiments, tmp_path):
    config = yaml.safe_load((experiments / "mha/config.yaml").read_text())
    stats = tmp_path / "stats.npz"
    np.savez(stats, count=9, sum=np.ones(20), sum_square=np.full(20, 9.0))
    config |= {"normalize": "global_mvn", "normalize_conf": {"stats_file": str(stats)}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    state = ASRTask.build_model(argparse.Namespace(**config)).state_dict()
    torch.save(state, tmp_path / "model.pth")
    ASRTask.build_model_from_file(tmp_path / "config.yaml", tmp_path / "model.pth")
    state[key] = change(state[key] + 1)
    torch.save(state, tmp_path / "model.pth")
    with pytest.raises(UserError, match=f"model.pth: {key} {said}"):
        ASRTask.build_model_from_file(tmp_path / "config.yaml", tmp_path / "model.pth")


def test_a_new_model_takes_parts_of_another(experiments):
    """init_param and initialisation by parts are no loading of a trained model: no refusal."""
    state = torch.load(experiments / "mha" / "model.pth")
    model = load(ASRTask, experiments, "mla", "mla")
    part = {k.removeprefix("decoder."): v for k, v in state.items() if k.startswith("decoder.")}
    model.decoder.load_state_dict(part)
    merged = model.state_dict() | {k: v for k, v in state.items() if k.startswith("ctc.")}
    model.load_state_dict(merged)


@pytest.mark.parametrize(
    ("files", "told"),
    [
        (["{exp}/linear/model.pth"], "missing keys: encoder.encoders.0.self_attn.pos_bias_u"),
        (["{exp}/none.pth"], "none.pth does not exist"),
        (["{exp}/mha/model.pth"], None),
        (["{exp}/linear/model.pth:decoder:decoder"], None),
        (["{exp}/mha/model.pth", "{exp}/linear/model.pth:ctc:ctc"], None),
    ],
    ids=["another", "none", "whole", "part", "both"],
)
def test_training_starts_from_a_file_that_fills_the_model(files, told, experiments):
    config = yaml.safe_load((experiments / "mha/config.yaml").read_text())
    config["init_param"] = [file.format(exp=experiments) for file in files]
    args = argparse.Namespace(**config)
    if told is None:
        TrainingTask.build_model(args)
        return
    with pytest.raises(UserError, match=f"^init_param .*{told}"):
        TrainingTask.build_model(args)
    args.ignore_init_mismatch = True
    TrainingTask.build_model(args)


def test_another_size_to_start_from_is_named(experiments):
    config = yaml.safe_load((experiments / "mla/config.yaml").read_text())
    config["init_param"] = [str(experiments / "mla8/model.pth")]
    with pytest.raises(UserError, match=r"other sizes: encoder.encoders.0.self_attn.linear_kv_"):
        TrainingTask.build_model(argparse.Namespace(**config))


class TestOneLatentOfAllLayers:
    @pytest.fixture(scope="class")
    def decoders(self, experiments, tmp_path_factory) -> Path:
        """Like `experiments`: latents of each layer, and one latent."""
        root = tmp_path_factory.mktemp("decoders")
        config = yaml.safe_load((experiments / "mha/config.yaml").read_text())
        for name, options in (("each", {}), ("one", {"shared_latent": True})):
            config["decoder"] = "kv_transformer"
            config["decoder_conf"] |= {
                "num_blocks": 3,
                "src_attention_type": "mla",
                "src_attention_conf": {"kv_rank": 4} | options,
            }
            (root / name).mkdir()
            (root / name / "config.yaml").write_text(yaml.safe_dump(config))
            model = ASRTask.build_model(argparse.Namespace(**config))
            torch.save(model.state_dict(), root / name / "model.pth")
        return root

    def test_is_not_filled_with_those_of_each_layer(self, decoders):
        load(ASRTask, decoders, "one", "one")
        load(ASRTask, decoders, "each", "one")
        with pytest.raises(UserError) as refused:
            load(ASRTask, decoders, "one", "each")
        told = str(refused.value)
        assert told.startswith(str(decoders / "each/model.pth"))
        assert "decoder.decoders.1.src_attn.linear_kv_down.weight" in told
        assert "leave shared_latent out" in told

    @pytest.mark.parametrize("part", ["", ":decoder:decoder"])
    def test_is_not_initialised_with_those_of_each_layer(self, part, decoders):
        config = yaml.safe_load((decoders / "one/config.yaml").read_text())
        model = TrainingTask.build_model(argparse.Namespace(**config))
        with pytest.raises(UserError, match=r"does not fit: .*src_attn.linear_kv_down.weight"):
            load_pretrained_model(f"{decoders}/each/model.pth{part}", model, False)
        load_pretrained_model(f"{decoders}/one/model.pth{part}", model, False)

    @pytest.mark.parametrize(
        "target", ["linear_kv_down", "0.src_attn.linear_kv_down", "1.src_attn.linear_kv_down", "_q"]
    )
    def test_gets_no_adapter_of_one_layer(self, target, decoders):
        for name in ("each", "one"):
            config = yaml.safe_load((decoders / name / "config.yaml").read_text())
            config |= {"use_adapter": True, "adapter_conf": {"target_modules": [target]}}
            args = argparse.Namespace(**config)
            if name == "each" or target == "_q":
                TrainingTask.build_model(args)
                continue
            with pytest.raises(UserError, match=r"^adapter_conf target_modules: .*kv_down are one"):
                TrainingTask.build_model(args)


class TestGuard:
    def outer(self) -> torch.nn.ModuleDict:
        """A model of which one part is guarded."""
        model = torch.nn.ModuleDict({"front": torch.nn.Linear(2, 2), "ours": torch.nn.Linear(2, 2)})
        self.guard = refuse_partial_loads(model["ours"])
        return model

    def test_keys_of_others_are_their_business(self):
        model = self.outer()
        state = {key: value for key, value in model.state_dict().items() if "ours" in key}
        keys = model.load_state_dict(state | {"other.weight": torch.zeros(1)}, strict=False)
        assert keys.missing_keys == ["front.weight", "front.bias"]

    @pytest.mark.parametrize("wrong", ["ours.weight", "ours.more"])
    def test_its_own_keys_have_to_fit(self, wrong):
        model = self.outer()
        state = dict(model.state_dict())
        if wrong in state:
            del state[wrong]
        else:
            state[wrong] = torch.zeros(1)
        with pytest.raises(UserError, match=wrong) as told:
            model.load_state_dict(state, strict=False)
        assert "front" not in str(told.value)

    def test_survives_pickling_and_copies(self):
        model = self.outer()
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            with pytest.raises(UserError, match=r"ours\.bias"):
                twin.load_state_dict({"ours.weight": torch.zeros(2, 2)}, strict=False)


def test_the_guard_can_be_taken_back():
    module = torch.nn.Linear(2, 2)
    guard = refuse_partial_loads(module)
    with pytest.raises(UserError, match="missing keys: bias; unexpected keys: scale"):
        module.load_state_dict({"weight": torch.ones(2, 2), "scale": torch.ones(1)}, strict=False)
    guard.remove()
    module.load_state_dict({"weight": torch.ones(2, 2)}, strict=False)
    assert torch.equal(module.weight, torch.ones(2, 2))


def decode(experiments: Path, config: str, model: str, folder: Path, *options: str) -> int:
    soundfile.write(folder / "u1.wav", 0.1 * torch.randn(16000).numpy(), 16000)
    (folder / "wav.scp").write_text(f"u1 {folder}/u1.wav\n")
    return asr_inference.main(
        [
            *["--asr_train_config", str(experiments / config / "config.yaml")],
            *["--asr_model_file", str(experiments / model / "model.pth")],
            *["--data_path_and_name_and_type", f"{folder}/wav.scp,speech,sound"],
            *["--output_dir", str(folder / "decoded"), "--ngpu", "0", "--num_workers", "0"],
            *["--beam_size", "2", "--maxlenratio", "-3", *options],
        ]
    )


@pytest.mark.parametrize("model", ["mha", "mla8"], ids=["other-attention", "other-size"])
def test_asr_inference_says_it_in_one_line(model, experiments, tmp_path, capsys):
    assert decode(experiments, "mla", model, tmp_path) == 1
    out, err = capsys.readouterr()
    assert "Traceback" not in out + err
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert "encoder.encoders.0.self_attn.linear_kv_down.weight" in errors[0]
    assert err.rstrip().endswith(errors[0])


def test_asr_inference_decodes(experiments, tmp_path):
    assert decode(experiments, "mla", "mla", tmp_path) == 0
    assert (tmp_path / "decoded/1best_recog/text").read_text().startswith("u1")


@pytest.mark.parametrize("batch", ["1", "2"])
def test_asr_inference_searches_with_a_cache(batch, experiments, tmp_path, monkeypatch):
    """In place of a stock decoder, unless told not to; what it writes is the same."""
    steps, searched = [], KVTransformerDecoder.batch_score

    def counted(decoder, ys, *args, **kwargs):
        steps.append(len(ys))
        return searched(decoder, ys, *args, **kwargs)

    monkeypatch.setattr(KVTransformerDecoder, "batch_score", counted)
    results = {}
    for cached in ("true", "false"):
        folder = tmp_path / cached
        folder.mkdir()
        torch.manual_seed(0)
        options = ["--kv_decoder", cached, "--fast_ctc", cached, "--nbest", "2"]
        options += ["--ctc_weight", "0.3"]
        assert decode(experiments, "mha", "mha", folder, *options, "--batch_size", batch) == 0
        assert bool(steps) == (cached == "true")
        steps.clear()
        files = sorted((folder / "decoded").glob("*best_recog/*"))
        results[cached] = {f"{f.parent.name}/{f.name}": f.read_text().split() for f in files}
    assert results["true"].keys() == results["false"].keys()
    for name, words in results["false"].items():
        if name.endswith("score"):
            number = [float(text[1].strip("tensor()")) for text in (words, results["true"][name])]
            assert number[1] == pytest.approx(number[0], abs=1e-4)
        else:
            assert results["true"][name] == words


@pytest.mark.parametrize("partial_ar", ["true", "false"])
def test_a_search_of_another_kind_keeps_the_stock_decoder(partial_ar, tmp_path, monkeypatch):
    from espnet2.bin import asr_inference as espnet

    tasks = []
    monkeypatch.setattr(espnet, "ASRTask", ASRTask)
    monkeypatch.setattr(espnet, "inference", lambda **_: tasks.append(espnet.ASRTask))
    data = ["--data_path_and_name_and_type", "wav.scp,speech,sound"]
    options = ["--output_dir", str(tmp_path / "out"), *data, "--partial_ar", partial_ar]
    for name in ("asr_train_config", "asr_model_file"):
        (tmp_path / name).write_text("")
        options += [f"--{name}", str(tmp_path / name)]
    assert asr_inference.main(options) == 0
    assert issubclass(tasks[0], CachedDecodingTask) == (partial_ar == "false")
    assert issubclass(tasks[0], ASRTask) and espnet.ASRTask is ASRTask
