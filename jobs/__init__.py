"""Command lines: each parses its arguments, calls one function of `pipelines` and prints where the result is."""
