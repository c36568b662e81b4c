"""What README and docs/ tell a reader to type works, and what they say is there is there."""

import importlib
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import commands
import kaldiio
import numpy as np
import pytest
import soundfile
import yaml
from packed import packed
from small_models import RATE, TOKENS, save, speech

from espnet_kv.espnet.whisper_weights import weights_follow
from espnet_kv.recipe import options

REPO = Path(__file__).parents[1]
RECIPE = REPO / "egs2/librispeech_100_kv/asr1"
PAGES = {
    str(path.relative_to(REPO)): path.read_text(encoding="utf-8")
    for path in (REPO / "README.md", *sorted((REPO / "docs").glob("*.md")))
}
COPIES = {"LIBRISPEECH", "SPEECHOCEAN762", "FSDD"}


def blocks(language: str) -> list[str]:
    found = (
        re.findall(rf"^```{language}\n(.*?)^```", text, re.M | re.S) for text in PAGES.values()
    )
    return [block for page in found for block in page]


def statements(block: str) -> list[str]:
    """Its commands without comments, continued lines joined and loops unrolled to their body."""
    lines = block.replace("\\\n", " ").splitlines()
    spoken = [re.split(r"(?:^|\s{2,}|\s)#\s", line)[0].strip() for line in lines]
    return [s for s in spoken if s and s != "done" and not re.fullmatch(r"for .*; do", s)]


COMMANDS = list(dict.fromkeys(s for block in blocks("sh") for s in statements(block)))


def of_kind(pattern: str) -> list[str]:
    return [command for command in COMMANDS if re.match(pattern, command)]


MAKE = of_kind("make ")
RECIPE_RUNS = of_kind(r"(\w+=\S+ )*\./run(_all)?\.sh\b")
HELP = of_kind(r"python -m .* --help$")
CODE = of_kind("python -c ")
DOCTOR = of_kind("python -m espnet_kv doctor")
OURS = [c for c in of_kind(r"python -m espnet_kv\.bin\.") if c not in HELP]
ESPNET3_RUNS = of_kind(r"(\w+=\S+ )*python run\.py ")  # tests/espnet3/test_espnet3_recipe.py
WRITTEN = of_kind("python -m espnet_kv recipe ")
LAUNCHED = of_kind("(torchrun|srun) ")
PLACES = of_kind("(cd|cp|pip install) ")


def run(words: list[str], cwd: Path = REPO) -> subprocess.CompletedProcess:
    words = [{"python": sys.executable}.get(words[0], words[0]), *words[1:]]
    env = os.environ | {"PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"}
    return subprocess.run(words, cwd=cwd, env=env, capture_output=True, text=True)


def test_there_are_commands():
    assert {"make demo", "make test", "./run.sh --dry_run true"} <= set(COMMANDS)


def test_every_command_is_tried():
    tried = {
        *MAKE,
        *RECIPE_RUNS,
        *HELP,
        *CODE,
        *DOCTOR,
        *OURS,
        *ESPNET3_RUNS,
        *WRITTEN,
        *LAUNCHED,
        *PLACES,
    }
    assert set(COMMANDS) == tried, set(COMMANDS) - tried


@pytest.mark.parametrize("command", MAKE)
def test_make_targets_exist(command):
    subprocess.run(["make", "--dry-run", *shlex.split(command)[1:]], cwd=REPO, check=True)


@pytest.mark.parametrize("command", RECIPE_RUNS)
def test_recipe_commands_are_understood(command, monkeypatch):
    """Up to the point where work would begin."""
    monkeypatch.chdir(RECIPE)
    for name in COPIES:
        monkeypatch.delenv(name, raising=False)
    words = shlex.split(command)
    while "=" in words[0]:
        name, value = words.pop(0).split("=")
        monkeypatch.setenv(name, value)
    assert os.access(words[0], os.X_OK)
    monkeypatch.setattr(options, "check_gpus", lambda ngpu, option: None)
    monkeypatch.setattr(options, "name_sources", _any_sources)
    args = options.parse(words[1:])
    copies = COPIES & {w.split("=")[0] for w in command.split()}
    assert [args.corpus_dir] == ([Path(os.environ[name]) for name in copies] or [None])


def _any_sources(paths, datadir):
    """A reader's own data directories, as if they were there."""
    return {path.name: path.resolve() for path in paths}


@pytest.mark.parametrize("command", HELP)
def test_help_commands_run(command):
    ended = commands.run(commands.run_module, *shlex.split(command)[2:])
    assert ended.returncode == 0, ended.stderr
    ours = {"asr_train": "kv_conformer", "report": "--expdir", "convert": "--kv_rank"}
    assert ours.get(command.split()[-2].rsplit(".", 1)[-1], "--cache_dtype") in ended.stdout


@pytest.mark.parametrize("command", CODE)
def test_one_liners_run(command):
    ended = run(shlex.split(command))
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.strip()


@pytest.mark.parametrize("command", DOCTOR)
def test_the_installation_is_looked_over(command):
    ended = commands.run(commands.run_module, *shlex.split(command)[2:])
    assert ended.returncode == 0 and "everything required is there" in ended.stdout, ended.stderr


@pytest.mark.parametrize("command", OURS)
def test_options_of_our_commands_are_understood(command):
    words = shlex.split(command)
    module = importlib.import_module(words[2])
    parser = getattr(module, "get_parser", None) or module.parser
    parser().parse_args(words[3:])


@pytest.fixture(scope="module")
def working_directory(tmp_path_factory) -> Path:
    """With the directories that commands of the pages write."""
    here = tmp_path_factory.mktemp("work")
    for command in WRITTEN:
        ended = run(shlex.split(command), cwd=here)
        assert ended.returncode == 0, ended.stderr
    return here


@pytest.mark.parametrize("command", LAUNCHED)
def test_options_of_distributed_training_are_understood(command):
    from espnet_kv.espnet.training import ASRTraining

    launcher, _, options = command.partition(" -m espnet_kv.bin.asr_train ")
    known = ASRTraining.get_parser()._option_string_actions
    assert options and {w for w in options.split() if w.startswith("--")} <= set(known)
    if launcher.startswith("torchrun"):
        from torch.distributed.run import get_args_parser

        get_args_parser().parse_args([*launcher.split()[1:], "script"])


@pytest.mark.parametrize("command", PLACES)
def test_places_that_commands_name_are_there(command, working_directory):
    """Where one goes, what one copies, what one installs."""
    words = [word for word in shlex.split(command) if not word.startswith("-")]
    place = words[-1] if words[0] == "pip" else words[1]
    assert any((top / place.split("[")[0]).is_dir() for top in (REPO, working_directory))
    assert words[0] != "pip" or all((REPO / word.split("[")[0]).exists() for word in words[2:])


@pytest.mark.parametrize("page", PAGES)
def test_benchmark_commands_name_options_that_exist(page, monkeypatch):
    """Those that stand in a sentence, beside a number."""
    monkeypatch.syspath_prepend(REPO / "benchmarks")
    for script, rest in re.findall(r"python benchmarks/(\w+)\.py\b([^`]*)`", PAGES[page]):
        known = importlib.import_module(script).get_parser()._option_string_actions
        unknown = {word for word in rest.split() if word.startswith("--")} - set(known)
        assert not unknown, f"benchmarks/{script}.py: {unknown}"


@pytest.mark.parametrize("block", blocks("yaml"))
def test_the_yaml_examples_build(block):
    from espnet2.tasks.asr import decoder_choices, encoder_choices
    from espnet2.tasks.lm import lm_choices

    config = yaml.safe_load(block)
    assert {"encoder", "decoder", "lm"} & set(config)
    if "kv_whisper" in config.values():
        pytest.importorskip("whisper.audio", reason="openai-whisper is not installed")
        with weights_follow():  # without a download
            encoder = encoder_choices.get_class(config["encoder"])(1, **config["encoder_conf"])
            decoder = decoder_choices.get_class(config["decoder"])
            decoder(51865, encoder.output_size(), **config["decoder_conf"])
        return
    if "encoder" in config:
        conf = {"num_blocks": 1, "rel_pos_type": "latest"} | config["encoder_conf"]
        encoder_choices.get_class(config["encoder"])(80, **conf)
    if "decoder" in config:
        decoder = decoder_choices.get_class(config["decoder"])
        decoder(100, 256, **{"num_blocks": 1} | config["decoder_conf"])
    if "lm" in config:
        lm_choices.get_class(config["lm"])(100, **{"layer": 1} | config["lm_conf"])


@pytest.fixture(scope="module")
def directory_of_a_reader(tmp_path_factory) -> Path:
    """Where a model was trained, under the names that the pages use: it has no chunks of its own,
    and its data is in archives."""
    here = tmp_path_factory.mktemp("reader")
    experiment = here / "exp/asr_x"
    experiment.mkdir(parents=True)
    chunks = {"chunk_size": 0, "left_chunks": -1, "dynamic_chunk_training": True}
    conf = {"encoder_conf": chunks | {"attention_type": "mha", "attention_conf": None}}
    many = [*TOKENS[:-1], *(f"<{n}>" for n in range(20)), TOKENS[-1]]  # more than a beam
    save(experiment, token_list=many, **conf)
    shutil.move(experiment / "model.pth", experiment / "valid.acc.ave.pth")
    packed(here, **conf).rename(here / "asr_x_valid.acc.ave.zip")
    (here / "conf").symlink_to(REPO / "conf")
    for name in ("test_clean", "train_clean_100"):
        folder = here / "dump/raw" / name
        folder.mkdir(parents=True)
        scp = f"ark,scp:{folder}/data_wav.1.ark,{folder}/wav.scp"
        with kaldiio.WriteHelper(scp, write_function="soundfile") as writer:
            for letters in ("ABBA_AB", "BA_ABB", "AABB", "B_A", "ABAB", "BBA_B"):
                writer[letters] = RATE, np.tile(speech(letters).numpy(), 2)
    soundfile.write(here / "speech.wav", speech("ABBA").numpy(), RATE)
    (here / "hotwords.txt").write_text("ABBA\n")
    return here


# a server does not end; see tests/serve
ENDING = [c for c in OURS if re.search(r"exp/asr_x\b", c) and "bin.serve" not in c]
QUICK = {"profile": ["--lengths", "2", "--utterances", "1", "--repeats", "1"]}


@pytest.mark.parametrize("command", ENDING)
def test_commands_for_one_model_run(command, directory_of_a_reader, monkeypatch):
    monkeypatch.chdir(directory_of_a_reader)
    words = shlex.split(command)
    if words[2].endswith(".export"):
        needs_graphs()
    if "--onnx_model" in words:
        a_graph()
    if "--output_dir" in words:  # other tests and pages may have made it
        shutil.rmtree(words[words.index("--output_dir") + 1], ignore_errors=True)
    more = QUICK.get(words[2].rpartition(".")[-1], [])
    ended = commands.run(commands.run_module, *words[2:], *more)
    assert ended.returncode == 0, ended.stderr


def needs_graphs() -> None:
    for package in ("onnx", "onnxruntime"):
        pytest.importorskip(package, reason="the extra [serve] is not installed")


def a_graph() -> None:
    """Export what the pages read, if no test has done it."""
    needs_graphs()
    if not Path("exp/asr_x/onnx").exists():
        (command,) = (c for c in ENDING if c.endswith("--output_dir exp/asr_x/onnx"))
        assert commands.run(commands.run_module, *shlex.split(command)[2:]).returncode == 0


def snippets() -> list:
    """(code, what it prints or None), in every page."""
    pattern = r"^```python\n(.*?)^```\n(?:\n```text\n(.*?)^```)?"
    return [
        pytest.param(code, shown or None, id=f"{page}-{number}")
        for page, text in PAGES.items()
        for number, (code, shown) in enumerate(re.findall(pattern, text, re.M | re.S), 1)
    ]


def test_every_python_block_is_a_snippet():
    assert [code for code, _ in (s.values for s in snippets())] == blocks("python")
    assert {s.id for s in snippets()} >= {"README.md-1", "docs/streaming.md-1"}


@pytest.mark.parametrize(("code", "shown"), snippets())
def test_python_snippets_run(code, shown, directory_of_a_reader, monkeypatch):
    """As scripts of their own; a text block right below is what they print.

    They run in forks that have loaded ESPnet and this package, so their imports are looked at.
    """
    assert "espnet2" not in code or re.search(r"^(import|from) espnet_kv\b", code, re.M)
    monkeypatch.setenv("HOME", str(directory_of_a_reader))  # where packs are unpacked
    monkeypatch.chdir(directory_of_a_reader)
    if "OnnxEngine" in code:
        a_graph()
    script = directory_of_a_reader / "snippet.py"
    script.write_text(code, encoding="utf-8")
    ended = commands.run(commands.run_script, str(script))
    assert ended.returncode == 0, ended.stderr
    if shown is not None:
        assert ended.stdout == shown
    elif "print(" in code:
        assert ended.stdout.strip()


def test_every_folder_has_its_line():
    """docs/layout.md lists the folders that hold code, and no others."""
    listed = set(re.findall(r"^\| `(\S+/)` \|", PAGES["docs/layout.md"], re.MULTILINE))
    for folder in listed:
        assert (REPO / folder).is_dir(), f"docs/layout.md lists {folder}, which is not there"
    folders = {
        f"{path.parent.relative_to(REPO)}/"
        for top in ("espnet_kv", "benchmarks", "scripts", "tests")
        for path in (REPO / top).rglob("*.*")
        if path.suffix in (".py", ".sh")
    }
    assert not folders - listed, f"docs/layout.md lacks {sorted(folders - listed)}"


def links(page: str) -> list[str]:
    return [t for t in re.findall(r"\]\(([^)]+)\)", PAGES[page]) if not t.startswith("http")]


def anchors(path: Path) -> set[str]:
    """The fragments of its headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    for target in links(page):
        name, _, fragment = target.partition("#")
        path = (REPO / page).parent / name if name else REPO / page
        assert path.exists(), target
        assert not fragment or fragment in anchors(path), target


def test_the_readme_leads_to_every_page():
    assert set(PAGES) - {"README.md"} <= {target.partition("#")[0] for target in links("README.md")}
