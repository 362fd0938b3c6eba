"""Scoring pictures on disk: which pictures under which prompts, their scores, and where those are written."""
