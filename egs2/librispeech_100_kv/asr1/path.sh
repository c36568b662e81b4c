# Which Python runs the recipe: one that is active, else the environment that `make` builds.
if [ -z "${python:-}" ]; then
    repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/../../.." && pwd)
    if [ -x "${repo}/.venv/bin/python" ] && ! python3 -c "import espnet_kv, espnet2" 2>/dev/null; then
        python="${repo}/.venv/bin/python"
    else
        python=python3
    fi
fi
export PYTHONUNBUFFERED=1

# option_value NAME DEFAULT "$@": the last value that --NAME has on a command line.
option_value() {
    local name="--$1" value="$2"
    shift 2
    while [ $# -gt 0 ]; do
        [ "$1" = "${name}" ] && [ $# -gt 1 ] && value="$2"
        [ "${1#"${name}="}" != "$1" ] && value="${1#"${name}="}"
        shift
    done
    echo "${value}"
}
