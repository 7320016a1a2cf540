"""Modules of tools/convert.py: readers of several checkpoint formats, and the common writer."""
