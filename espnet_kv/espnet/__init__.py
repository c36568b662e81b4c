"""Everything that knows the inside of ESPnet; each replacement is undone when its caller leaves."""
