"""Runs egs3's recipe several times in one process, as run.py does: loading ESPnet takes seconds.

Called in the directory of the recipe with a JSON list of lists of words; prints for each what the
program would end with: null, or its status or last line.
"""

import json
import os
import sys
import traceback
from pathlib import Path

sys.path.insert(0, str(Path.cwd()))

if __name__ == "__main__":
    from espnet3.systems.launch import launch
    from src.plain import plainly
    from src.system import KVSystem

    for words in json.loads(sys.argv[1]):
        said = None
        while words and "=" in words[0]:  # of the environment
            os.environ.__setitem__(*words.pop(0).split("=", 1))
        try:
            plainly(launch)(KVSystem, conf_package="egs3.TEMPLATE.esp2_asr", argv=words)
        except SystemExit as end:
            said = end.code
        except Exception:
            said = traceback.format_exc()
        print("ended:", json.dumps(said), flush=True)
