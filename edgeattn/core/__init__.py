"""The ground floor: errors, tensor specs, numerics, hashing, atomic files. No torch at import, no other room."""
