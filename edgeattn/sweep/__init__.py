"""Sweeps: models in every target, precision and device of a matrix, resumed where they stopped."""
