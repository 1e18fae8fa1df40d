"""What applies gradients: optimiser, mixed precision, averaged weights, non-finite guard."""
