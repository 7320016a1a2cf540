"""Modules of tools/convert.py: sources of several formats, and the one thing they become."""
