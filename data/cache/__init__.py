"""Numpy arrays in files that processes map, and what is known about large files."""
