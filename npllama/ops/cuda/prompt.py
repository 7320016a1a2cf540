"""Blocks of many tokens: 16-bit products on tensor cores, and kernels between them."""
