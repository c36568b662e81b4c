"""Speech recognition with small KV caches, as a recipe of ESPnet3; docs/espnet3.md has commands."""

import sys

if __name__ == "__main__":  # processes of a stage import this file as well, and need no more of it
    from espnet3.systems.launch import launch
    from src.plain import plainly
    from src.system import KVSystem

    sys.exit(plainly(launch)(KVSystem, conf_package="egs3.TEMPLATE.esp2_asr"))
