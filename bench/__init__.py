"""Microbenchmarks. Protocol: README.md; commands: `fastpref bench`, which is `python -m bench`."""
