"""Policies over real model families."""
