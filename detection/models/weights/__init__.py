"""Weights of this and other projects: reading safely, naming, matching, reporting."""
