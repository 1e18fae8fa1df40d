"""Geometry, augmentation and color, and the hash that replaces random state."""
