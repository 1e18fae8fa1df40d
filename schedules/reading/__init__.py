"""Schedule and configuration files, read without executing them."""
