"""The stages of check_gpu.sh, a module each; results.py is the table that they fill."""
