"""Measurements of speed and memory; `launch/benchmark.py` is their only importer."""
