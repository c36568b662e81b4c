"""All code that depends on ESPnet's internals; replacements are undone at the end of a block."""
