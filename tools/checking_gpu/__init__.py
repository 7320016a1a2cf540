"""The stages of check_gpu.sh, one module each; results.py holds the table of their results."""
