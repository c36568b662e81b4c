"""Registration of our classes with ESPnet, in any order of imports.

ESPnet keeps its `--encoder` choices in module-level tables, one in `espnet2.tasks.asr` and a
copy in ESPnet3. Loading ESPnet takes many seconds, so the tables are extended when ESPnet is
imported and not when `espnet_kv` is imported.
"""

import argparse
import contextlib
import importlib
import importlib.abc
import importlib.machinery
import io
import sys
from multiprocessing.reduction import ForkingPickler

from espnet_kv.names import REMARK

# table of choices -> choice -> module:class
CHOICES = {
    "encoder_choices": {
        "kv_conformer": "espnet_kv.encoder.encoders:KVConformerEncoder",
        "kv_branchformer": "espnet_kv.encoder.encoders:KVBranchformerEncoder",
        "kv_e_branchformer": "espnet_kv.encoder.encoders:KVEBranchformerEncoder",
        "kv_transformer": "espnet_kv.encoder.encoders:KVTransformerEncoder",
        "kv_whisper": "espnet_kv.encoder.whisper_encoder:KVWhisperEncoder",
    },
    "decoder_choices": {
        "kv_transformer": "espnet_kv.decoder.transformer:KVTransformerDecoder",
        "kv_whisper": "espnet_kv.decoder.whisper_decoder:KVWhisperDecoder",
    },
}
TASK_MODULES = ("espnet2.tasks.asr", "espnet3.systems.esp2_asr.task")
ATTENTION_MODULE = "espnet2.legacy.nets.pytorch_backend.transformer.attention"


def register() -> None:
    """Add our classes to ESPnet's choices, now or as soon as ESPnet is imported.

    It can be called several times. Processes spawned by ESPnet also register, because unpickling
    the argparse.Namespace that ESPnet sends them imports `espnet_kv`.
    """
    if not any(isinstance(finder, _ModuleFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _ModuleFinder())
        ForkingPickler.register(argparse.Namespace, _reduce_namespace)
    for name in TASK_MODULES:
        # if the import of the module is still running, its loader calls _fill_choices
        if hasattr(sys.modules.get(name), "ASRTask"):
            _fill_choices(sys.modules[name])


def _fill_choices(module) -> None:
    for table_name, choices in CHOICES.items():
        table = getattr(module, table_name)
        table.classes = _Choices(table.classes)
        for choice, target in choices.items():
            module_name, class_name = target.split(":")
            table.classes[choice] = getattr(importlib.import_module(module_name), class_name)


class _Choices(dict):
    """A table of choices whose names may have the remark of packs behind them."""

    def __contains__(self, name: object) -> bool:
        return super().__contains__(str(name).removesuffix(REMARK))

    def __getitem__(self, name: str) -> type:
        return super().__getitem__(name.removesuffix(REMARK))


def _run_quietly(run_module, module) -> None:
    """Run a module without its message that flash_attn, which is not needed, is not installed."""
    with contextlib.redirect_stderr(io.StringIO()) as messages:
        run_module(module)
    for line in messages.getvalue().splitlines(keepends=True):
        if "No module named 'flash_attn'" not in line:
            sys.stderr.write(line)


class _ModuleFinder(importlib.abc.MetaPathFinder):
    """Finds modules of ESPnet as usual, and extends the tables of its tasks after they have run."""

    def find_spec(self, fullname, path=None, target=None):
        if fullname not in (*TASK_MODULES, ATTENTION_MODULE):
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            run_module = spec.loader.exec_module

            def exec_module(module):
                if fullname == ATTENTION_MODULE:
                    _run_quietly(run_module, module)
                else:
                    run_module(module)
                    _fill_choices(module)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def _restore_namespace(values: dict) -> argparse.Namespace:
    return argparse.Namespace(**values)


def _reduce_namespace(namespace: argparse.Namespace):
    # unpickling imports the module of this function, and so espnet_kv, in the new process
    return _restore_namespace, (vars(namespace),)
