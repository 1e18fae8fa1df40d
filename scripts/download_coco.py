"""Fetches COCO 2017 into the layout that training expects.

    python scripts/download_coco.py                                       everything, into datasets/coco
    python scripts/download_coco.py --parts val,annotations --data-path DIR

Stop it whenever you like: the same command goes on where it was. Sizes and SHA-256 sums are checked, what is complete
is left alone, and the archives are deleted once they are unpacked.
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import checkout  # noqa: F401
from data.tools.coco_archives import ARCHIVES, BASE_URL, check_space, fetch_archive
from data.tools.download import DownloadError
from detection.reporting import Console

MEGABYTE = 1_000_000


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "--data-path", metavar="DIR", type=Path, default=Path("datasets/coco"), help="default datasets/coco"
    )
    parser.add_argument(
        "--parts",
        metavar="PART,...",
        type=_parts,
        default=list(ARCHIVES),
        help=f"any of {', '.join(ARCHIVES)} (default: all; 19.3 GB, 0.8 GB and 0.3 GB to fetch for train, val, "
        "annotations)",
    )
    parser.add_argument(
        "--base-url",
        metavar="URL",
        default=BASE_URL,
        help=f"a mirror with COCO's own paths below it (default {BASE_URL}; "
        "https://s3.amazonaws.com/images.cocodataset.org is the same over TLS)",
    )
    parser.add_argument("--keep-archives", action="store_true", help="keep the zip files after unpacking")
    arguments = parser.parse_args(argv)

    console = Console()

    @contextmanager
    def progress(description: str, total: int) -> Iterator[Callable[[int], None]]:
        shown = 0
        with console.progress(max(total // MEGABYTE, 1), description=description, unit="MB") as bar:

            def advance(done: int) -> None:
                nonlocal shown
                if (steps := done // MEGABYTE - shown) > 0:
                    shown += steps
                    bar.update(steps)

            yield advance

    # Small ones first: whoever waits for the images can look at the annotations meanwhile.
    archives = [archive for part, archive in ARCHIVES.items() if part in arguments.parts]
    try:
        check_space(archives, arguments.data_path, keep_archives=arguments.keep_archives)
        for archive in archives:
            fetch_archive(
                archive,
                arguments.data_path,
                base_url=arguments.base_url,
                keep_archive=arguments.keep_archives,
                say=console.say,
                progress=progress,
            )
    except (DownloadError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        return 130
    return 0


def _parts(text: str) -> list[str]:
    parts = [part.strip() for part in text.split(",") if part.strip()]
    unknown = [part for part in parts if part not in ARCHIVES]
    if unknown or not parts:
        raise argparse.ArgumentTypeError(f"{text!r}: parts are {', '.join(ARCHIVES)}")
    return parts


if __name__ == "__main__":
    raise SystemExit(main())
