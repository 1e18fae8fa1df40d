"""Data sets of a run, their augmentation, the batches that all processes have, unreadable images and data stalls."""
