"""The rules of the package's construction: who imports whom, and what names what."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).parents[1]
PACKAGE = REPO / "espnet_kv"
RECIPE = REPO / "egs2/librispeech_100_kv/asr1"

# What a part may import of the package besides itself; errors is open to all. A part is a
# module or folder of the package.
LAYERS = {
    "errors": set(),
    "cli": set(),
    "files": set(),
    "heap": set(),
    "packed": set(),
    "names": set(),
    "config": {"names"},
    "scores": set(),
    "channels": set(),
    "containers": set(),
    "sound_files": {"containers"},
    "cache": set(),
    "attention": {"cache"},
    "encoder": {
        "packed",
        "cache",
        "attention",
        "espnet.signatures",
        "espnet.loading",
        "espnet.openai_whisper",
    },
    "decoder": {
        "cache",
        "attention",
        "espnet.signatures",
        "espnet.loading",
        "espnet.openai_whisper",
    },
    "lm": {"cache", "attention", "decoder", "espnet.signatures", "espnet.loading"},
    "espnet": {
        "cli",
        "files",
        "heap",
        "packed",
        "names",
        "config",
        "cache",
        "encoder",
        "decoder",
        "lm",
        "streaming.recordings",
    },
    "streaming": {
        "files",
        "packed",
        "channels",
        "containers",
        "sound_files",
        "cache",
        "encoder",
        "espnet",
    },
    "export": {"cli", "attention", "cache", "encoder", "streaming"},
    "serve": {"streaming"},
    "convert": {
        "files",
        "scores",
        "cache",
        "attention",
        "encoder",
        "decoder",
        "espnet",
        "streaming",
        "__init__",
    },
    "profile": {
        "files",
        "heap",
        "packed",
        "attention",
        "cache",
        "encoder",
        "decoder",
        "espnet",
        "streaming",
        "__init__",
    },
    "report": {"files", "profile", "scores"},  # its schema: the rest of profile needs torch
    "doctor": {"espnet.register"},
    "__main__": {"doctor"},
    "__init__": {"espnet.register"},
}
WITHOUT_ESPNET = (
    "errors",
    "cli",
    "files",
    "heap",
    "packed",
    "config",
    "scores",
    "channels",
    "containers",
    "sound_files",
    "cache",
    "attention",
    "report",
    "recipe",
)


def module_name(path: Path) -> str:
    name = ".".join(path.relative_to(REPO).with_suffix("").parts)
    return name.removesuffix(".__init__")


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in MODULES.items()}


def part(module: str) -> str:
    """espnet_kv.attention.grouped -> attention."""
    return [*module.split("."), "__init__"][1]


def imports(module: str) -> set[str]:
    """Modules that a module imports, also within its functions."""
    found = set()
    for node in ast.walk(TREES[module]):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: relative import"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found.add(inner if inner in MODULES else str(node.module))
    return found


def own_imports(module: str) -> set[str]:
    return {name for name in imports(module) if name.split(".")[0] == "espnet_kv"}


# what changes something in a running Python, or reaches into ESPnet's unofficial modules
INTRUSIONS = ("espnet2.legacy", "sys.meta_path", "ForkingPickler", "__class__ =", "torch.save =")


def test_one_folder_knows_the_inside_of_espnet():
    for module, path in MODULES.items():
        text = path.read_text(encoding="utf-8")
        assert part(module) == "espnet" or not any(word in text for word in INTRUSIONS), module


def test_the_package_imports_none_of_its_surroundings():
    for module in MODULES:
        for name in imports(module):
            assert name.split(".")[0] not in ("egs2", "conf", "tests", "benchmarks"), module


@pytest.mark.parametrize("module", [m for m in MODULES if part(m) in LAYERS])
def test_imports_go_one_way(module):
    allowed = LAYERS[part(module)] | {part(module), "errors"}
    for name in own_imports(module):
        inner = name.removeprefix("espnet_kv.")
        assert part(name) in allowed or inner in allowed, f"{module} imports {name}"


def test_every_part_has_its_place():
    assert {part(m) for m in MODULES} <= {*LAYERS, "recipe", "bin"}


def test_nothing_imports_the_recipe_and_the_recipe_alone_imports_commands():
    for module in MODULES:
        for name in own_imports(module):
            if part(name) in ("bin", "recipe") and part(module) != part(name):
                assert (part(module), part(name)) == ("recipe", "bin"), f"{module}: {name}"


def test_no_module_name_twice():
    """Commands are named after what they do, which may be the name of a folder."""
    names = [
        path.stem
        for path in MODULES.values()
        if path.parent.name != "bin" and not path.stem.startswith("__")
    ]
    twice = {name for name in names if names.count(name) > 1}
    assert not twice


def test_no_file_is_longer_than_400_lines():
    for tree in (PACKAGE, REPO / "tests", REPO / "benchmarks"):
        for path in tree.rglob("*.py"):
            assert len(path.read_text(encoding="utf-8").splitlines()) <= 400, path


def test_no_two_modules_import_each_other():
    reached = {module: own_imports(module) & MODULES.keys() for module in MODULES}
    for module, direct in reached.items():
        seen, waiting = set(), list(direct - {module})
        while waiting:
            name = waiting.pop()
            if name not in seen:
                seen.add(name)
                waiting += reached[name] - {name}
        cycle = module in seen
        assert not cycle, f"{module} imports itself by way of {sorted(seen)}"


def test_attention_by_name_only():
    """Encoders and tasks hold whatever attention they are given: none is named there."""
    for module in MODULES:
        if part(module) not in ("encoder", "decoder", "lm", "task", "cache"):
            continue
        for node in ast.walk(TREES[module]):
            if isinstance(node, ast.Compare):
                compared = [node.left, *node.comparators]
                named = {c.value for c in compared if isinstance(c, ast.Constant)}
                assert not named & {"gqa", "mla"}, f"{module}:{node.lineno}"
        classes = {name.rsplit(".", 1)[-1] for name in own_imports(module)}
        assert not classes & {"grouped", "latent", "linear"}, module


IMPORT_ALL = """
import importlib, sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {refused!r}:
            raise ImportError(name + " was imported")

sys.meta_path.insert(0, Refuse())
for name in {modules!r}:
    importlib.import_module(name)
"""


def import_refusing(modules: list[str], refused: tuple[str, ...]) -> None:
    code = IMPORT_ALL.format(modules=modules, refused=refused)
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, timeout=400
    )
    assert done.returncode == 0, done.stderr


def test_attention_and_cache_import_without_espnet():
    modules = [m for m in MODULES if part(m) in WITHOUT_ESPNET and not m.endswith("__main__")]
    import_refusing(["espnet_kv", *modules], ("espnet2", "espnet3", "espnet"))


def test_report_and_recipe_import_without_torch():
    light = ("errors", "report", "recipe", "__init__")
    modules = [m for m in MODULES if part(m) in light and not m.endswith("__main__")]
    import_refusing(modules, ("espnet2", "espnet3", "espnet", "torch", "torchaudio"))


@pytest.mark.parametrize("module", MODULES)
def test_every_public_name_says_its_purpose(module):
    tree = TREES[module]
    assert ast.get_docstring(tree) or not tree.body, f"{module}: no docstring"
    for node in tree.body:
        named = isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")
        assert not named or ast.get_docstring(node), f"{module}.{node.name}: no docstring"


SCRIPTS = sorted([*RECIPE.glob("*.sh"), *(RECIPE / "local").glob("*.sh")])


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: str(p.relative_to(RECIPE)))
def test_recipe_scripts_run_nothing_but_our_modules(script):
    text = re.sub(r"(?m)^\s*#.*$", "", script.read_text(encoding="utf-8"))
    for call in re.findall(r"\bpython3?[\w.]*\}?\"?\s+(-\S+(?:\s+\S+)?)", text):
        looks_for_it = call.startswith('-c "import') and script.name == "path.sh"
        assert looks_for_it or re.match(r"-m espnet_kv\b", call), call
    for tool in ("sclite", "sox", "compute-wer", "utils/", "steps/", "ffmpeg", "pip "):
        assert tool not in text, tool


def test_the_recipe_scripts_are_thin():
    for script in SCRIPTS:
        assert len(script.read_text(encoding="utf-8").splitlines()) < 60, script.name


def test_every_package_that_is_imported_is_declared():
    declared = set(re.findall(r'^\s+"([a-z0-9_-]+)', (REPO / "setup.py").read_text(), re.MULTILINE))
    names = {"yaml": "pyyaml", "espnet2": "espnet", "espnet3": "espnet"}
    tops = {name.split(".")[0] for module in MODULES for name in imports(module)}
    others = {top for top in tops if top not in sys.stdlib_module_names and top != "espnet_kv"}
    wanted = {names.get(top, top).replace("_", "-") for top in others}
    missing = wanted - {name.replace("_", "-") for name in declared}
    assert not missing, f"setup.py lacks {sorted(missing)}"


def test_a_console_script_is_the_module_of_its_name():
    """`espnet_kv_NAME` is `python -m espnet_kv.bin.NAME`, as docs/install.md says."""
    scripts = re.findall(r'^\s+"espnet_kv_(\w+) = (.+)"', (REPO / "setup.py").read_text(), re.M)
    assert {name for name, _ in scripts} >= {"asr_train", "stream", "recipe"}
    assert {f"espnet_kv.bin.{name}:main" for name, _ in scripts} == {what for _, what in scripts}
    assert all(f"espnet_kv.bin.{name}" in MODULES for name, _ in scripts)
    page = (REPO / "docs/install.md").read_text()
    assert set(re.findall(r"`espnet_kv_(\w+)`", page)) == {name for name, _ in scripts}
