"""Numbers in words."""


def counted(number: int, one: str, several: str | None = None) -> str:
    """ "1 image", "2 images"; `several` where it is not `one` with an s."""
    return f"{number:,} {one if number == 1 else several or one + 's'}"


def duration(seconds: float) -> str:
    """Seconds as m:ss, h:mm:ss or "2 d 03:04:05"; "?" where the figure is no finite number of seconds."""
    if not 0 <= seconds < float("inf"):
        return "?"
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    if days:
        return f"{days} d {hour:02d}:{minute:02d}:{second:02d}"
    return f"{hour}:{minute:02d}:{second:02d}" if hour else f"{minute}:{second:02d}"
