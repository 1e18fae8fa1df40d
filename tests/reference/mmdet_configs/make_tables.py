"""What MMEngine makes of the configurations here, and of those in MMDetection's wheel: resolved.json, hashes.json.

pip install mmengine==0.10.7; pip download --no-deps mmdet==3.3.0, unpacked; python make_tables.py mmdet/.mim/configs
"""

import hashlib
import json
import sys
from pathlib import Path

from mmengine.config import Config

HERE = Path(__file__).parent


def canonical(value):
    """JSON with tuples and sets marked, as tests/config/test_mmdet_config.py has it."""
    if isinstance(value, dict):
        return {key: canonical(item) for key, item in value.items()}
    if isinstance(value, tuple):
        return {"__tuple__": [canonical(item) for item in value]}
    if isinstance(value, set):
        return {"__set__": sorted(json.dumps(item) for item in value)}
    return [canonical(item) for item in value] if isinstance(value, list) else value


def resolved(root):
    found = {}
    for path in sorted(root.rglob("*.py")):
        try:
            values = canonical(Config.fromfile(path, import_custom_modules=False).to_dict())
            found[path.relative_to(root).as_posix()] = json.dumps(values, sort_keys=True, separators=(",", ":"))
        except Exception as error:  # programs, files of other packages, and base files that do not exist
            print(path, error)
    return found


own = {name: json.loads(text) for name, text in resolved(HERE / "configs").items()}
(HERE / "resolved.json").write_text(json.dumps(own, indent=1, sort_keys=True) + "\n")
if len(sys.argv) > 1:
    texts = resolved(Path(sys.argv[1]))
    hashes = {name: hashlib.sha256(text.encode()).hexdigest()[:16] for name, text in texts.items()}
    (HERE / "hashes.json").write_text(json.dumps(hashes, indent=0, sort_keys=True) + "\n")
