"""COCO annotation files to validated flat arrays, checks, and COCO's own layout on disk."""
