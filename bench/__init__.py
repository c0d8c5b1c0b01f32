"""Microbenchmarks. Protocol: README.md; `python -m bench.head_cpu`, `python -m bench.head_gpu`."""
