"""The base of every error of this package that a user can mend."""


class DetectionError(ValueError):
    """What is wrong, where, and how to mend it. Programs show the message without a traceback."""
