# Where existing copies of the corpora lie; empty: stage 1 downloads what is missing. Environment
# variables of the same names win; then comes what is written here, then ESPnet's own db.sh.
if [ -f "${PWD%/*/*}/TEMPLATE/asr1/db.sh" ]; then
    . "${PWD%/*/*}/TEMPLATE/asr1/db.sh"
fi
LIBRISPEECH="${LIBRISPEECH:-}"         # the folder LibriSpeech or the one that holds it
SPEECHOCEAN762="${SPEECHOCEAN762:-}"   # the folder that holds train/ and test/
FSDD="${FSDD:-}"                       # a checkout of the free-spoken-digit-dataset
