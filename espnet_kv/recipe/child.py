"""The process of a job: it ends with the run, and calls the main function of the command.

    python -m espnet_kv.recipe.child WATCHED_FD MODULE ARGUMENT ...

The process is a new one, as above, or a fork of a server that has loaded ESPnet.
"""

import importlib
import logging
import os
import sys
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path

from espnet_kv.errors import UserError
from espnet_kv.recipe.pool import end_with, end_with_parent


def call(module: str, arguments: Sequence[str]) -> int:
    """Call `module.main(arguments)`, print exceptions on stderr, and return the exit status."""
    sys.argv = [module, *arguments]  # ESPnet logs its command line
    try:
        status = importlib.import_module(module).main(list(arguments)) or 0
    except SystemExit as ended:
        status = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        status = 1
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    return status


def forked(
    module: str,
    arguments: Sequence[str],
    log: Path,
    environment: Mapping[str, str],
    threads: int,
) -> None:
    """Run a job in a fork of the server; `environment` replaces that of the server."""
    end_with_parent()
    os.environ.clear()
    os.environ.update(environment)
    with log.open("a", encoding="utf-8") as file, open(os.devnull, encoding="utf-8") as nothing:
        os.dup2(nothing.fileno(), 0)
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    # handlers of the server's imports would prevent ESPnet from configuring its logging
    logging.root.handlers.clear()
    if "torch" in sys.modules:  # torch has read the server's OMP_NUM_THREADS
        sys.modules["torch"].set_num_threads(threads)
    sys.exit(call(module, arguments))


if __name__ == "__main__":
    end_with(int(sys.argv[1]))
    sys.exit(call(sys.argv[2], sys.argv[3:]))
