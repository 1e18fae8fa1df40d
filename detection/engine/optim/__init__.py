"""What applies gradients: optimizer, mixed precision, averaged weights, non-finite guard."""
