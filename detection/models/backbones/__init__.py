"""Backbones and the feature pyramid on top of them."""
