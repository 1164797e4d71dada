"""Measurements. Each module runs with `python -m benchmarks.<name>` and writes JSON and a picture."""
