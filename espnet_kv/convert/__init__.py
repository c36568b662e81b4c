"""Trained multi-head attention made into mla, gqa or linear: the mathematics of it."""
