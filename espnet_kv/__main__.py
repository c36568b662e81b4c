"""Run any Python module, script or code with the plug-in registered.

    python -m espnet_kv -m espnet2.bin.asr_train --encoder kv_conformer ...

replaces `python`, e.g. in ESPnet's `asr.sh --python "python3 -m espnet_kv"`. Where `espnet_kv.bin`
has a command with the options and files of ESPnet's, it runs instead: models are saved atomically
and loaded strictly, and decoding uses the cached decoder. ESPnet's streaming command is replaced
only for models with an encoder of this package, and for `--model_tag`, which it does not know.

`python -m espnet_kv recipe DIR` writes the recipe's files (espnet_kv.bin.recipe), and
`python -m espnet_kv doctor` checks what is installed (espnet_kv.bin.doctor).
"""

import argparse
import os
import re
import runpy
import sys
import types

STREAMING = "asr_inference_streaming"
OURS = (
    *("asr_inference", "asr_train", "lm_calc_perplexity", "lm_train", STREAMING),
    "whisper_export_vocabulary",
)
"""Modules of espnet_kv.bin that take the place of those in espnet2.bin."""
WORDS = ("doctor", "recipe")
"""Modules of espnet_kv.bin with a short name: `python -m espnet_kv recipe DIR`."""
USAGE = "usage: python -m espnet_kv (-m MODULE | -c CODE | SCRIPT | doctor | recipe) [ARGUMENT ...]"


def main() -> None:
    """Run the target with its options as sys.argv; the exit status is that of the target."""
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE)
        sys.exit(0 if arguments else 2)
    if arguments[0] in ("-m", "-c") and len(arguments) == 1:
        print(f"error: {arguments[0]} needs a value; {USAGE}", file=sys.stderr)
        sys.exit(2)
    if arguments[0] == "-m":
        sys.argv = arguments[1:]
        module = arguments[1]
        package, _, name = module.rpartition(".")
        ours = package == "espnet2.bin" and name in OURS
        if ours and (name != STREAMING or _is_for_ours(arguments[2:])):
            module = f"espnet_kv.bin.{name}"
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    elif arguments[0] == "-c":
        sys.argv = ["-c", *arguments[2:]]
        main_module = sys.modules["__main__"] = types.ModuleType("__main__")
        exec(compile(arguments[1], "<string>", "exec"), vars(main_module))
    elif arguments[0] in WORDS:
        sys.argv = arguments
        runpy.run_module(f"espnet_kv.bin.{arguments[0]}", run_name="__main__", alter_sys=True)
    elif arguments[0].startswith("-"):
        print(f"error: unknown option {arguments[0]}; {USAGE}", file=sys.stderr)
        sys.exit(2)
    else:
        sys.argv = arguments
        sys.path[0] = os.path.dirname(os.path.abspath(arguments[0]))
        runpy.run_path(arguments[0], run_name="__main__")


def _is_for_ours(options: list[str]) -> bool:
    """Whether the options name a pack, or a configuration with an encoder of this package."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--asr_train_config")
    parser.add_argument("--model_tag")
    try:
        given = parser.parse_known_args(options)[0]
        if given.model_tag is not None:
            return True
        with open(given.asr_train_config, encoding="utf-8") as file:
            return any(re.match(r"encoder:\s*kv_", line) for line in file)
    except (OSError, TypeError, UnicodeDecodeError, argparse.ArgumentError):
        return False  # the command itself reports the error


if __name__ == "__main__":
    main()
