"""Makes the procedural shapes set in COCO's layout."""

import argparse
import sys
import time

import checkout  # noqa: F401
from data.tools.shapes import ShapesError, make_shapes


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--data-path", default="datasets/shapes", help="folder to make the set in")
    parser.add_argument("--seed", type=int, default=0, help="another seed gives another set")
    parser.add_argument("--num-train", type=int, default=600, help="training images")
    parser.add_argument("--num-val", type=int, default=150, help="validation images")
    parser.add_argument("--width", type=int, default=256, help="pixels (portrait images swap the two)")
    parser.add_argument("--height", type=int, default=192, help="pixels")
    arguments = parser.parse_args(argv)

    start = time.monotonic()
    try:
        folder = make_shapes(
            arguments.data_path,
            seed=arguments.seed,
            num_train=arguments.num_train,
            num_val=arguments.num_val,
            size=(arguments.width, arguments.height),
        )
    except (ShapesError, OSError) as error:
        print(f"make_shapes: {error}", file=sys.stderr)
        return 1
    print(f"{folder}: {arguments.num_train} training and {arguments.num_val} validation images ", end="")
    print(f"({time.monotonic() - start:.1f} s)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
