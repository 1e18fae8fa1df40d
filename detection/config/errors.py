"""What is raised for a command line that cannot be followed."""

from detection.errors import DetectionError


class ConfigError(DetectionError):
    """An option that is wrong, or options that contradict each other. The message names them and the remedy."""
