"""What programs here begin with: the root of this checkout at the head of sys.path, so that they run without installing
anything; their parser; and one line for an error."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))


def program_parser(doc: str | None) -> argparse.ArgumentParser:
    """A parser that shows `doc` as it is written and takes options by their whole names only."""
    return argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )


def empty_folder(text: str) -> Path:
    """An argparse type: a folder that is empty or not there yet."""
    folder = Path(text).resolve()
    if folder.is_dir() and any(folder.iterdir()):
        raise argparse.ArgumentTypeError(f"{folder} is not empty; give another")
    return folder


def exit_status(
    work: Callable[[], int], *errors: type[Exception], status: int = 2, stopped: str = "stopped", name: str = "error"
) -> int:
    """What `work` returns; after one of `errors` the status given, after Ctrl-C 130, each with a line on stderr."""
    try:
        return work()
    except errors as error:
        print(f"{name}: {error}", file=sys.stderr)
        return status
    except KeyboardInterrupt:
        print(stopped, file=sys.stderr)
        return 130
