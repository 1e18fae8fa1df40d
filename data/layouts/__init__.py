"""A folder as a labeling tool or a data set's author left it: which layout it has, and its splits as COCO files."""
