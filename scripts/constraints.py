"""Print the installed versions of the packages that setup.py names: `make constraints`."""

import re
from importlib.metadata import version
from pathlib import Path

import setuptools  # noqa: F401
from distutils.core import run_setup  # of setuptools

packages = run_setup(str(Path(__file__).parents[1] / "setup.py"), stop_after="init")
print("# Versions of the direct dependencies that were tested; written by `make constraints`.")
wanted = sum(packages.extras_require.values(), packages.install_requires)
for name in sorted({re.split(r"[\[<>=!~; ]", one)[0] for one in wanted}):
    print(f"{name}=={version(name).partition('+')[0]}")  # without a local label such as +cpu
