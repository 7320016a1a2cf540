"""Modules of tools/measure_overrides.py: what it measures, and how it compares two functions."""
