"""Helpers that every package of the pipeline uses."""
