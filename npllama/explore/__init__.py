"""Explore LLaMA-2: one real run of a model, as arrays, as pictures and as a page.

`npllama.explore.record.record` runs a prompt and returns a Record of plain NumPy arrays.
`npllama.explore.figures` has a function for each picture. `npllama.explore.page.page` makes the
page. `python -m npllama.explore` does all of it.
"""
