"""Modules of tools/benchmark.py: one file for each thing it measures or shows."""
