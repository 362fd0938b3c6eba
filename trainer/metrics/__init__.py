"""Metrics: pure functions of features, and what they say of a set of models."""
