"""ESPnet's Transformer decoder with a choice of attention and a key/value cache."""
