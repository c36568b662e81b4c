# Sourced by every script of the recipe: settings of the user and of an ESPnet checkout around this
# folder, and the Python. ESPnet's setup.sh puts its own path.sh, cmd.sh and db.sh in the place of
# ours, so what must not get lost is done here.

# $PWD is where the user copied or linked this folder to; an ESPnet checkout is looked for there
template=${PWD%/*/*}/TEMPLATE/asr1
[ -f "${template}/asr.sh" ] || template=
case "${template}" in
    *[[:space:]]*)
        echo "error: ${template}: scripts of ESPnet fail below a folder with a space in its name:" \
            "move the checkout" >&2
        exit 1
        ;;
esac

databases=("${LIBRISPEECH:-}" "${SPEECHOCEAN762:-}" "${FSDD:-}")
. ./path.sh
. ./cmd.sh
. ./db.sh
export LIBRISPEECH="${databases[0]:-${LIBRISPEECH:-}}"
export SPEECHOCEAN762="${databases[1]:-${SPEECHOCEAN762:-}}"
export FSDD="${databases[2]:-${FSDD:-}}"

repo=$(cd -P ../../.. && pwd)
if [ -d "${repo}/espnet_kv" ]; then # a clone works without being installed
    export PYTHONPATH="${repo}${PYTHONPATH:+:${PYTHONPATH}}"
fi
has() { # has PYTHON MODULE
    "$1" -c "import sys, importlib.util as u; sys.exit(u.find_spec('$2') is None)" 2>/dev/null
}
python=${kv_python:-${python:-}}
if [ -z "${python}" ]; then
    if has python3 espnet2; then
        python=python3
    elif has "${repo}/.venv/bin/python" espnet2; then
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
if [ ! -d "${repo}/espnet_kv" ] && ! has "${python}" espnet_kv; then
    echo "error: ${python} has no espnet_kv: install the package there, or activate an environment" \
        "that has it" >&2
    exit 1
fi
case "${python}" in
    */*) export PATH="$(dirname "${python}"):${PATH}" ;; # scripts of ESPnet call python3
esac
export kv_python="${python}" PYTHONUNBUFFERED=1
export -n python # asr.sh sets a variable of this name to a command
