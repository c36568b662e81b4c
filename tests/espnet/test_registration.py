"""ESPnet knows our encoders: in any order of imports, in its children, in its commands."""

import argparse
import json
import multiprocessing
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import yaml

import espnet_kv
from espnet_kv.espnet.register import CHOICES, TASK_MODULES

REPO = Path(__file__).parents[2]
KINDS = ("kv_conformer", "kv_branchformer", "kv_e_branchformer", "kv_transformer", "kv_whisper")


def python(*arguments: str, cwd: Path = REPO) -> subprocess.CompletedProcess:
    """Run this Python elsewhere, with the package importable."""
    path = {"PYTHONPATH": str(REPO), "PATH": "/usr/bin:/bin", "HOME": str(cwd)}
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=cwd, env=path, capture_output=True, text=True, timeout=300)


REPORT = """
import json
kinds = {kinds!r}
facts = {{}}
for module in (espnet2.tasks.asr, espnet3.systems.esp2_asr.task):
    choices = module.encoder_choices
    facts[module.__name__] = {{
        "classes": [choices.get_class(kind).__name__ for kind in kinds],
        "offered": [kind in choices.choices() for kind in kinds],
        "stock": choices.get_class("conformer").__name__,
        "count": len(choices.classes),
    }}
finders = [type(f).__name__ for f in sys.meta_path]
facts["finders"] = finders.count("_ModuleFinder")
print(json.dumps(facts))
"""
BEFORE = """
import sys
import espnet_kv, espnet_kv.attention, espnet_kv.cache, espnet_kv.espnet.loading, espnet_kv.recipe
assert not {"espnet2", "espnet3"} & set(sys.modules), "espnet_kv is not light"
espnet_kv.register()
import espnet2.tasks.asr, espnet3.systems.esp2_asr.task
espnet_kv.register()
"""
AFTER = """
import sys
import espnet3.systems.esp2_asr.task, espnet2.tasks.asr
count = len(espnet2.tasks.asr.encoder_choices.classes)
import espnet_kv
assert len(espnet2.tasks.asr.encoder_choices.classes) == count + 5
espnet_kv.register()
"""


@pytest.mark.parametrize("start", [BEFORE, AFTER], ids=["before-espnet", "after-espnet"])
def test_espnet_and_espnet3_know_the_encoders(start):
    done = python("-c", start + REPORT.format(kinds=KINDS))
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout.splitlines()[-1])
    assert facts.pop("finders") == 1
    assert set(facts) == set(TASK_MODULES)
    for choices in facts.values():
        assert choices["classes"] == [
            "KVConformerEncoder",
            "KVBranchformerEncoder",
            "KVEBranchformerEncoder",
            "KVTransformerEncoder",
            "KVWhisperEncoder",
        ]
        assert all(choices["offered"])
        assert choices["stock"] == "ConformerEncoder"


def test_the_parser_of_espnet_takes_our_encoders():
    from espnet2.tasks.asr import ASRTask

    parser = ASRTask.get_parser()
    for kind in CHOICES["encoder_choices"]:
        options = ["--encoder", kind, "--encoder_conf", "attention_type=mla"]
        args = parser.parse_args([*options, "--output_dir", "x"])
        assert (args.encoder, args.encoder_conf) == (kind, {"attention_type": "mla"})


def test_espnet3_builds_a_model_of_our_task():
    from espnet3.utils.task_utils import get_espnet_model

    from espnet_kv.encoder.encoders import KVConformerEncoder

    model = get_espnet_model(
        "espnet_kv.espnet.task.ASRTask",
        {
            "token_list": ["<blank>", "<unk>", "A", "<sos/eos>"],
            "encoder": "kv_conformer",
            "encoder_conf": {
                "output_size": 16,
                "num_blocks": 1,
                "rel_pos_type": "latest",
                "attention_type": "linear",
            },
            "decoder": "transformer",
            "decoder_conf": {"num_blocks": 1, "linear_units": 8},
        },
    )
    assert isinstance(model.encoder, KVConformerEncoder)


CHILD = """
import sys

def main_worker(args, answers):
    # as a process spawned by espnet2.tasks.abs_task.AbsTask.main, which imports no plug-in
    from espnet2.tasks.asr import ASRTask, encoder_choices
    answers.put((args.encoder, encoder_choices.get_class(args.encoder).__name__))
"""


def test_a_spawned_process_knows_the_encoders(tmp_path, monkeypatch):
    (tmp_path / "throwaway_worker.py").write_text(CHILD)
    monkeypatch.syspath_prepend(tmp_path)
    from throwaway_worker import main_worker

    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    args = argparse.Namespace(encoder="kv_branchformer", ngpu=2)
    process = context.Process(target=main_worker, args=(args, answers))
    process.start()
    answer = answers.get(timeout=200)
    process.join(60)
    assert process.exitcode == 0
    assert answer == ("kv_branchformer", "KVBranchformerEncoder")


TARGET = """
import json, sys
from espnet_kv.espnet.register import _ModuleFinder
print(json.dumps([
    __name__,
    sys.argv,
    sys.modules["__main__"].__dict__ is globals(),
    any(isinstance(f, _ModuleFinder) for f in sys.meta_path),
]))
sys.exit(7)
"""
OPTIONS = ["--encoder", "kv_conformer", "-m", "x", "--help", "-c", "", "--lr=1e-3", "a b"]


@pytest.fixture
def targets(tmp_path) -> Path:
    """throwaway_target.py, a package of that kind, and a script beside a module it imports."""
    (tmp_path / "throwaway_target.py").write_text(TARGET)
    (tmp_path / "throwaway_package").mkdir()
    (tmp_path / "throwaway_package/__init__.py").touch()
    (tmp_path / "throwaway_package/__main__.py").write_text(TARGET)
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts/run.py").write_text("import beside\n" + TARGET)
    (tmp_path / "scripts/beside.py").touch()
    return tmp_path


@pytest.mark.parametrize(
    ("how", "argv0"),
    [
        (["-m", "throwaway_target"], "{}/throwaway_target.py"),
        (["-m", "throwaway_package"], "{}/throwaway_package/__main__.py"),
        (["scripts/run.py"], "scripts/run.py"),
        (["-c", TARGET], "-c"),
    ],
    ids=["module", "package", "script", "code"],
)
def test_python_m_espnet_kv_is_python(targets, how, argv0):
    done = python("-m", "espnet_kv", *how, *OPTIONS, cwd=targets)
    assert done.returncode == 7, done.stderr
    assert done.stderr == ""
    name, argv, is_main, registered = json.loads(done.stdout)
    assert (name, is_main, registered) == ("__main__", True, True)
    assert argv == [argv0.format(targets), *OPTIONS]


@pytest.mark.parametrize(
    ("arguments", "code", "told"),
    [
        (["-c", "pass"], 0, ""),
        (["-c", "import sys; sys.exit('sorry')"], 1, "sorry"),
        (["-c", "1 / 0"], 1, "ZeroDivisionError"),
        (["-m", "no_such_module"], 1, "no_such_module"),
        (["no_such_script.py"], 1, "no_such_script.py"),
        (["-m"], 2, "error: -m needs a value"),
        (["-c"], 2, "error: -c needs a value"),
        (["--nonsense"], 2, "error: unknown option --nonsense"),
        ([], 2, ""),
        (["--help"], 0, ""),
    ],
    ids=str,
)
def test_exit_codes(arguments, code, told, tmp_path):
    done = python("-m", "espnet_kv", *arguments, cwd=tmp_path)
    assert done.returncode == code
    assert told in done.stderr
    if code == 2:
        assert "usage:" in done.stdout + done.stderr


TINY = {
    "encoder": "kv_conformer",
    "encoder_conf": {
        "output_size": 16,
        "attention_heads": 2,
        "linear_units": 16,
        "num_blocks": 1,
        "rel_pos_type": "latest",
        "cnn_module_kernel": 3,
        "attention_type": "mla",
        "attention_conf": {"kv_rank": 4},
        "dynamic_chunk_training": True,
        "causal": True,
    },
    "decoder": "transformer",
    "decoder_conf": {"attention_heads": 2, "linear_units": 16, "num_blocks": 1},
    "frontend_conf": {"n_mels": 20},
    "max_epoch": 1,
    "num_workers": 0,
    "batch_type": "unsorted",
    "batch_size": 2,
    "use_matplotlib": False,
    "use_tensorboard": False,
}


def noise_corpus(folder: Path, utterances: int) -> Path:
    """wav.scp, text and shape of some noise."""
    folder.mkdir()
    random = np.random.default_rng(0)
    lists: dict[str, str] = {"wav.scp": "", "text": "", "shape": ""}
    for i in range(utterances):
        samples = 8000 + 400 * i
        soundfile.write(folder / f"u{i}.wav", random.normal(0, 0.1, samples), 16000)
        lists["wav.scp"] += f"u{i} {folder}/u{i}.wav\n"
        lists["text"] += f"u{i} {'ABBA'[: 2 + i % 3]}\n"
        lists["shape"] += f"u{i} {samples}\n"
    for name, content in lists.items():
        (folder / name).write_text(content)
    return folder


@pytest.mark.slow
def test_two_ranks_train_under_torchrun(tmp_path):
    train, valid = noise_corpus(tmp_path / "train", 8), noise_corpus(tmp_path / "valid", 2)
    (tmp_path / "tokens.txt").write_text("<blank>\n<unk>\nA\nB\n<sos/eos>\n")
    (tmp_path / "train.yaml").write_text(yaml.safe_dump(TINY))
    data = []
    for part, folder in (("train", train), ("valid", valid)):
        for line in ("wav.scp,speech,sound", "text,text,text"):
            data += [f"--{part}_data_path_and_name_and_type", f"{folder}/{line}"]
        data += [f"--{part}_shape_file", f"{folder}/shape"]
    done = python(
        *["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"],
        *["-m", "espnet_kv", "-m", "espnet2.bin.asr_train", "--config", "train.yaml"],
        *["--ngpu", "0", "--dist_backend", "gloo", "--multiprocessing_distributed", "false"],
        *["--token_type", "char", "--token_list", "tokens.txt", "--output_dir", "exp", *data],
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert ":0/2]" in done.stderr  # rank 0 of 2 keeps the log
    assert yaml.safe_load((tmp_path / "exp/config.yaml").read_text())["distributed"] is True
    state = torch.load(tmp_path / "exp/valid.loss.best.pth")
    assert "encoder.encoders.0.self_attn.linear_kv_down.weight" in state
    assert all(value.isfinite().all() for value in state.values())


def test_register_again_changes_nothing():
    before = list(sys.meta_path)
    espnet_kv.register()
    assert sys.meta_path == before


def test_names_at_the_top_are_loaded_when_they_are_asked_for():
    code = (
        "import sys, espnet_kv, espnet_kv.convert\n"
        "assert not {'torch', 'espnet2'} & sys.modules.keys()\n"
        "from espnet_kv import ASRTask, EncoderState, StreamingRecognizer\n"
        "from espnet_kv.convert import convert_model, factorize_kv\n"
        "assert {c.__name__ for c in (ASRTask, EncoderState, StreamingRecognizer)} < {*dir()}\n"
        "assert not hasattr(espnet_kv, 'nothing')\n"
    )
    ended = python("-c", code)
    assert ended.returncode == 0, ended.stderr
