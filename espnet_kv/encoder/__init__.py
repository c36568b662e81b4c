"""ESPnet's encoders with a choice of attention."""
