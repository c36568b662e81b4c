"""What a model costs: cache bytes, time, memory, as one JSON (docs/profile.md)."""
