"""Run any Python module, script or code with the plug-in registered.

    python -m espnet_kv -m espnet2.bin.asr_train --encoder kv_conformer ...

takes the place of `python`: ESPnet's own `asr.sh --python "python3 -m espnet_kv"` works unchanged.
"""

import os
import runpy
import sys
import types

USAGE = "usage: python -m espnet_kv (-m MODULE | -c CODE | SCRIPT) [ARGUMENT ...]"


def main() -> None:
    """Hand the command line over; exit status, options and sys.argv are the target's own."""
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE)
        sys.exit(0 if arguments else 2)
    if arguments[0] in ("-m", "-c") and len(arguments) == 1:
        print(f"error: {arguments[0]} needs a value; {USAGE}", file=sys.stderr)
        sys.exit(2)
    if arguments[0] == "-m":
        sys.argv = arguments[1:]
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    elif arguments[0] == "-c":
        sys.argv = ["-c", *arguments[2:]]
        module = sys.modules["__main__"] = types.ModuleType("__main__")
        exec(compile(arguments[1], "<string>", "exec"), vars(module))
    elif arguments[0].startswith("-"):
        print(f"error: unknown option {arguments[0]}; {USAGE}", file=sys.stderr)
        sys.exit(2)
    else:
        sys.argv = arguments
        sys.path[0] = os.path.dirname(os.path.abspath(arguments[0]))
        runpy.run_path(arguments[0], run_name="__main__")


if __name__ == "__main__":
    main()
