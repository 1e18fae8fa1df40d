"""Detectors and backbones that are a user's own code."""
