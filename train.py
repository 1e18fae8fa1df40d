"""Train, validate or test a detector: python train.py --help"""

import os
import sys
import traceback

from detection.config import ConfigError, parse_arguments
from detection.process_exit import leave


def main() -> int:
    try:
        config = parse_arguments()
    except ConfigError as error:
        return fail_together(error)
    # OpenMP lets threads spin while they wait, which on a machine with other work takes cores from those that they wait
    # for. It reads this when PyTorch loads it.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # Only now: PyTorch takes seconds, and neither --help nor a wrong option shall wait for it.
    from detection.engine import USER_ERRORS, RunError, run

    try:
        return run(config)
    except (ConfigError, RunError) as error:
        return fail_together(error)
    except USER_ERRORS as error:
        print(f"\nerror: {error}", file=sys.stderr)
    except Exception:
        # Not Python's own way out: where it happens to one process of several, exchanges are under way that nobody will
        # answer, and the end of the interpreter would wait for them.
        traceback.print_exc()
    return 1


def fail_together(error: Exception) -> int:
    """The exit status of an error that every process has; one of them says it."""
    if os.environ.get("RANK", "0") == "0":
        print(f"\nerror: {error}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    leave(main())
