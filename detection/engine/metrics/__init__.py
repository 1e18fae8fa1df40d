"""What a run reports: losses of each step, the metric logger, images for TensorBoard."""
