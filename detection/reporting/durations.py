"""Lengths of time as people read them."""


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


def remaining(seconds_so_far: float, done: int, total: int) -> str:
    """The time that the rest takes at the pace so far, as duration() writes it; "?" before anything is
    done."""
    return duration(seconds_so_far / done * (total - done)) if done > 0 else "?"
