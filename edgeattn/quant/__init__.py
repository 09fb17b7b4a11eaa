"""Quantization: what is stored in how many bits, what it is measured on, and what it costs."""
