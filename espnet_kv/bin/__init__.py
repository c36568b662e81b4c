"""Commands: `python -m espnet_kv.bin.NAME --help`."""
