"""Puts the root of this checkout at the head of sys.path, so that the scripts run without installing anything."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))
