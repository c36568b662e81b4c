# Where existing copies of the corpora lie; empty: stage 1 downloads what is missing. Environment
# variables of the same names win.
export LIBRISPEECH="${LIBRISPEECH:-}"         # the folder LibriSpeech or the one that holds it
export SPEECHOCEAN762="${SPEECHOCEAN762:-}"   # the folder that holds train/ and test/
export FSDD="${FSDD:-}"                       # a checkout of the free-spoken-digit-dataset
