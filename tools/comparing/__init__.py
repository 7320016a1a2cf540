"""Modules of tools/equivalence.py: how far each implementation differs from float64."""
