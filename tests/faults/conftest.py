"""The helpers of tests/ are importable here as well."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
