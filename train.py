"""Train, validate or test a detector: python train.py --help"""

import sys

from detection.config import ConfigError, parse_arguments
from detection.engine import USER_ERRORS, RunError, is_main_process, run


def main() -> int:
    try:
        return run(parse_arguments())
    except (ConfigError, RunError) as error:  # every process has it, one says it
        if is_main_process():
            print(f"\nerror: {error}", file=sys.stderr)
    except USER_ERRORS as error:
        print(f"\nerror: {error}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
