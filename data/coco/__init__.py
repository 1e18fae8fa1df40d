"""COCO annotation files to validated flat arrays, their cache, checks, and COCO's own layout on disk."""
