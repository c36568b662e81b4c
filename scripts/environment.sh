#!/usr/bin/env bash
# Print the Python to use: the active one if it has ESPnet, else that of .venv, built when missing.
# Needs no argument. Progress goes to standard error, so that $(scripts/environment.sh) works.
set -euo pipefail
repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv="${repo}/.venv"

say() { echo "$*" >&2; }

# fits PYTHON: new enough for ESPnet, and able to make virtual environments
fits() {
    "$1" -c "import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 12))" 2>/dev/null
}

# has_modules PYTHON MODULE...
has_modules() {
    "$1" - "${@:2}" 2>/dev/null <<'PY'
import importlib.util, sys
sys.exit(sys.version_info < (3, 12) or not all(map(importlib.util.find_spec, sys.argv[1:])))
PY
}

candidates() {
    local minor
    command -v python3 || true
    for minor in 12 13 14; do
        command -v "python3.${minor}" || true
    done
    if command -v pyenv >/dev/null; then
        local root
        root=$(pyenv root)
        for minor in 12 13 14; do
            ls -d "${root}/versions/3.${minor}".*/bin/python 2>/dev/null || true
        done
    fi
    if command -v uv >/dev/null; then
        uv python find ">=3.12" 2>/dev/null || true
    fi
}

find_python() {
    local python
    while read -r python; do
        if fits "${python}"; then
            echo "${python}"
            return
        fi
    done < <(candidates)
    say "error: no Python 3.12 or newer with the venv module was found: install one, e.g." \
        "'apt install python3.12-venv', 'brew install python@3.12', 'pyenv install 3.12' or" \
        "'conda create -n espnet_kv python=3.12 && conda activate espnet_kv', and try again"
    return 1
}

active=$(command -v python3 || true)
if [ -n "${active}" ] && has_modules "${active}" espnet2 torch torchaudio; then
    modules=(sentencepiece kaldiio jiwer matplotlib pandas jinja2 pydantic yaml espeakng_loader)
    modules+=(tqdm psutil pytest xdist hypothesis ruff mypy onnx onnxruntime sherpa_onnx whisper tiktoken)
    modules+=(aiohttp prometheus_client)
    if ! has_modules "${active}" "${modules[@]}"; then
        say "adding what ${active} lacks of the project's tools"
        "${active}" -m pip install --quiet "${repo}[dev]" >&2
        "${active}" -m pip uninstall --quiet --yes espnet_kv >&2
    fi
    echo "${active}"
    exit
fi

# a changed setup.py means other dependencies
wanted=$(cksum <"${repo}/setup.py")
if [ ! -f "${venv}/installed" ] || [ "$(cat "${venv}/installed")" != "${wanted}" ]; then
    if [ ! -x "${venv}/bin/python" ] || ! fits "${venv}/bin/python"; then
        python=$(find_python)
        say "making ${venv} with $("${python}" --version) (${python})"
        rm -rf "${venv}"
        "${python}" -m venv "${venv}"
    fi
    say "installing ESPnet and its dependencies: a few minutes, some 6 GB"
    "${venv}/bin/python" -m pip install --quiet --upgrade pip >&2
    "${venv}/bin/python" -m pip install --progress-bar off --editable "${repo}[dev]" |
        grep --line-buffered -E "^(Collecting|Installing|Successfully)" | cut -c 1-110 >&2
    echo "${wanted}" >"${venv}/installed"
fi
echo "${venv}/bin/python"
