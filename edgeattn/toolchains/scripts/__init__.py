"""Scripts that run with a toolchain's own Python; they import nothing of EdgeAttn, which is not installed there."""
