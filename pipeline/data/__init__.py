"""Reads the user's files and makes checked training rows of them."""
