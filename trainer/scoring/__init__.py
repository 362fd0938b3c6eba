"""Scoring of image files: which images under which prompts, their scores, and the files of results."""
