"""Measures `fuse` on the corpus of custom losses: `python -m bench.custom --help`."""
