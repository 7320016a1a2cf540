"""Equivalence: how far each implementation of the mathematics is from float64."""
