"""Modules of tools/benchmark.py: one file per thing that it measures or prints."""
