"""Measurements: each command prints one JSON line last, with ratios to a baseline of the same run."""
