"""ESPnet's Conformer, Branchformer and E-Branchformer with a choice of attention."""
