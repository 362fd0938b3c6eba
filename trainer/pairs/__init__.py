"""Pairs for learning from preference: from scored images to labelled, filtered and split pairs."""
