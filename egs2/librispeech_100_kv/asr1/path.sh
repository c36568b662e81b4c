# Which Python runs the recipe: the one named in $python, an active one that has ESPnet, else the
# environment that `make` built. Inside an ESPnet checkout its own path.sh comes first.
if [ -f ../../TEMPLATE/asr1/path.sh ]; then
    . ../../TEMPLATE/asr1/path.sh
fi
repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/../../.." && pwd)
if [ -z "${python:-}" ]; then
    python=python3
    if [ -x "${repo}/.venv/bin/python" ] &&
        ! python3 -c "import sys, importlib.util as u; sys.exit(u.find_spec('espnet2') is None)"; then
        python="${repo}/.venv/bin/python"
    fi
fi
if [ -d "${repo}/espnet_kv" ]; then # a clone works without being installed
    export PYTHONPATH="${repo}${PYTHONPATH:+:${PYTHONPATH}}"
fi
export PYTHONUNBUFFERED=1
