"""What the keys of MMDetection's configuration files mean here."""
