"""Language models with a choice of attention and a key/value cache."""
