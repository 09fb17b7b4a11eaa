"""Decoders in the pipeline: what their reference is, samples of their entries, and how artifacts are verified."""
