"""From annotations to batches on the training device: order, workers, transport, prefetching."""
