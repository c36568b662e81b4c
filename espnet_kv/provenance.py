"""Which commit made a result."""

import subprocess
from pathlib import Path

PACKAGE = Path(__file__).parent


def commit(directory: Path = PACKAGE) -> str | None:
    """The commit of a directory's checkout, with -dirty where files differ from it.

    Args:
        directory: by default this package's.

    Returns:
        None outside git, and where the directory lies in a repository that does not track it.
    """

    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(directory), *arguments], capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    try:
        if not git("ls-files"):
            return None
        return git("describe", "--always", "--dirty", "--abbrev=12")
    except (OSError, subprocess.CalledProcessError):
        return None
