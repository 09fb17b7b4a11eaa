"""Measuring on a device: transports that carry a bundle there, and what its runner brings back."""
