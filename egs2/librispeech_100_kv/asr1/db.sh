# Where an existing tree in LibriSpeech layout lies (its folder LibriSpeech or the parent of that);
# empty: stage 1 downloads what is missing. The environment variable of the same name wins.
export LIBRISPEECH="${LIBRISPEECH:-}"
