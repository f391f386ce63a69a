"""The networks, each for one part of a SANA-Sprint; every learnable operation comes from `ops`."""
