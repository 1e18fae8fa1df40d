"""The base of all errors of the data path that are the user's to mend."""


class DataError(ValueError):
    """Files or settings of a data set that cannot be used; the message says what is wrong, where, and the remedy."""
