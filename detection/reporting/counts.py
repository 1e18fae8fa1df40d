"""Numbers of things in words."""


def counted(number: int, one: str, several: str | None = None) -> str:
    """ "1 image", "2 images"; `several` where it is not `one` with an s."""
    return f"{number:,} {one if number == 1 else several or one + 's'}"
