"""Independent implementations of the rewards, which the ports are checked against; written apart from them, and slow."""
