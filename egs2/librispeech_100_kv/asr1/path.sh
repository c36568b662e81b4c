# Which Python runs the recipe: the one named in $python, an active one that has ESPnet, else the
# environment that `make env` built. Inside an ESPnet checkout its own path.sh comes first.
if [ -f ../../TEMPLATE/asr1/path.sh ]; then
    . ../../TEMPLATE/asr1/path.sh
fi
repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/../../.." && pwd)
has_espnet() {
    "$1" -c "import sys, importlib.util as u; sys.exit(u.find_spec('espnet2') is None)" 2>/dev/null
}
if [ -z "${python:-}" ]; then
    if has_espnet python3; then
        python=python3
    elif has_espnet "${repo}/.venv/bin/python"; then
        python=${repo}/.venv/bin/python
    elif [ -f "${repo}/Makefile" ]; then
        echo "error: no Python with ESPnet was found: type 'make -C \"${repo}\" env' to build one" \
            "(some minutes, 6 GB), or activate an environment that has ESPnet" >&2
        exit 1
    else
        echo "error: no Python with ESPnet was found: activate an environment that has it" >&2
        exit 1
    fi
fi
if [ -d "${repo}/espnet_kv" ]; then # a clone works without being installed
    export PYTHONPATH="${repo}${PYTHONPATH:+:${PYTHONPATH}}"
fi
export PYTHONUNBUFFERED=1
