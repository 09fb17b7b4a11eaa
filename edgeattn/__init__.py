"""EdgeAttn: from a PyTorch model to the device it must run on, with the numbers proven on the way."""
