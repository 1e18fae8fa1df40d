"""COCO annotation files to validated flat arrays, their cache, checks, and known layouts on disk."""
