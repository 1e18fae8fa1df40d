"""Fetches COCO 2017 into the layout that training expects.

    python scripts/download_coco.py                                       everything, into datasets/coco
    python scripts/download_coco.py --parts val,annotations --data-path DIR

Stop it whenever you like: the same command goes on where it was. Sizes and SHA-256 sums are checked, what is complete
is left alone, and the archives are deleted once they are unpacked.
"""

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from checkout import exit_status, program_parser
from data.tools.coco_archives import ARCHIVES, BASE_URL, check_space, fetch_archive
from data.tools.download import DownloadError
from detection.reporting import Console

MEGABYTE = 1_000_000


def main(argv: list[str] | None = None) -> int:
    parser = program_parser(__doc__)
    add = parser.add_argument
    add("--data-path", metavar="DIR", type=Path, default=Path("datasets/coco"), help="default datasets/coco")
    parts = (
        f"any of {', '.join(ARCHIVES)} (default: all; 19.3 GB, 0.8 GB and 0.3 GB to fetch for train, val, annotations)"
    )
    add("--parts", metavar="PART,...", type=_parts, default=list(ARCHIVES), help=parts)
    mirror = (
        f"a mirror with COCO's own paths below it (default {BASE_URL}; "
        "https://s3.amazonaws.com/images.cocodataset.org is the same over TLS)"
    )
    add("--base-url", metavar="URL", default=BASE_URL, help=mirror)
    add("--keep-archives", action="store_true", help="keep the zip files after unpacking")
    arguments = parser.parse_args(argv)
    stopped = "stopped; the same command goes on from here"
    return exit_status(lambda: _download(arguments, Console()), DownloadError, OSError, status=1, stopped=stopped)


def _download(arguments: argparse.Namespace, console: Console) -> int:
    @contextmanager
    def progress(description: str, total: int) -> Iterator[Callable[[int], None]]:
        with console.progress(max(total // MEGABYTE, 1), description=description, unit="MB") as bar:
            yield lambda done: bar.update(max(0, done // MEGABYTE - bar.done))

    # Small ones first: whoever waits for the images can look at the annotations meanwhile.
    archives = [archive for part, archive in ARCHIVES.items() if part in arguments.parts]
    keep, base_url = arguments.keep_archives, arguments.base_url
    check_space(archives, arguments.data_path, keep_archives=keep)
    for archive in archives:
        fetch_archive(archive, arguments.data_path, base_url=base_url, keep_archive=keep, say=console.say,
                      progress=progress)  # fmt: skip
    return 0


def _parts(text: str) -> list[str]:
    parts = [part.strip() for part in text.split(",") if part.strip()]
    unknown = [part for part in parts if part not in ARCHIVES]
    if unknown or not parts:
        raise argparse.ArgumentTypeError(f"{text!r}: parts are {', '.join(ARCHIVES)}")
    return parts


if __name__ == "__main__":
    raise SystemExit(main())
