# Paths of ESPnet's tools, inside an ESPnet checkout; its path.sh looks for them relative to $PWD.
recipe=${PWD}
if [ -f "${PWD%/*/*}/TEMPLATE/asr1/path.sh" ]; then
    cd "${PWD%/*/*}/TEMPLATE/asr1"
    . ./path.sh
    cd "${recipe}"
fi
. ./local/path.sh
