"""Data sets of a run, their augmentation, unreadable images and data stalls."""
