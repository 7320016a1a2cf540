"""Modules of tools/train.py: text, tokenizer, batches, optimizer, checkpoints, loss curve."""
