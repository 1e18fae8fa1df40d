"""docs/mmdetection_configs.md: which of MMDetection's own configurations run here. Run as a program it rewrites the
page: python3 -m detection.config.mmdet_page FOLDER, with mmdet/.mim/configs of MMDetection 3.3.0's wheel."""

from __future__ import annotations

import sys
from pathlib import Path

from detection.config.mmdet_run import read_run
from detection.config.settings import ConfigError

PAGE = Path(__file__).resolve().parents[2] / "docs" / "mmdetection_configs.md"
FOLDERS = (
    *("faster_rcnn", "mask_rcnn", "cascade_rcnn", "gn", "gn+ws", "lvis", "objects365", "pascal_voc", "regnet"),
    *("resnet_strikes_back", "scratch", "selfsup_pretrain", "strong_baselines"),
)
OPENING = """# MMDetection's configurations here

What `train.py --config FILE` says to each file of MMDetection 3.3.0's folders {folders}.
{runs} of {all} run; of these, {files} need `--weights FILE`, as their starting weights are not
fetched here.

This page is made from the files and not written by hand; `python3 -m detection.config.mmdet_page FOLDER` rewrites it.

| configuration | here |
|---|---|"""


def page(folder: Path) -> str:
    """The page as Markdown. folder: the configs of MMDetection."""
    files = [path for name in FOLDERS for path in sorted((folder / name).glob("*.py"))]
    said = {path.relative_to(folder).as_posix(): _said(path, folder) for path in files}
    needs_file = sum("--weights FILE" in text for text in said.values())
    runs = sum(text.startswith("runs") for text in said.values())
    opening = OPENING.format(
        folders=", ".join(f"`{name}`" for name in FOLDERS), runs=runs, all=len(said), files=needs_file
    )
    return "\n".join([opening, *(f"| `configs/{name}` | {text} |" for name, text in said.items())]) + "\n"


def _said(path: Path, folder: Path) -> str:
    try:
        run = read_run(path, (), "train")
    except ConfigError as error:
        return "refused: " + str(error).replace(f"{folder}/", "configs/").replace("|", "\\|").replace("<", "\\<")
    try:
        run.under({}, {})
    except ConfigError:
        return f"runs with `--weights FILE` ({run.settings['weights'].value})"
    return "runs"


if __name__ == "__main__":
    PAGE.write_text(page(Path(sys.argv[1])))
