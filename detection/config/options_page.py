"""docs/options.md: every option of train.py. python3 -m detection.config.options_page writes it from the settings."""

from __future__ import annotations

from dataclasses import Field
from pathlib import Path
from typing import Any

from detection.config.cli import GROUPS
from detection.config.run_config import RunConfig
from detection.config.settings import OnResume, Option, is_switch, settings_of

PAGE = Path(__file__).resolve().parents[2] / "docs" / "options.md"
OPENING = """# Options of train.py

Every option, its default, and the key under which `config.json` and checkpoints hold it. `python3 train.py
--help-all` says the same. This page is made from the settings in `detection/config` and not written by hand;
`python3 -m detection.config.options_page` rewrites it.

"On resume" says whose value holds where the command line of a resumed run differs from the run in the checkpoint. The
start of the run prints each difference with the one that wins.

| on resume | what holds |
|---|---|"""
HEAD = "| option | what | default | on resume | key |"


def options_page() -> str:
    """The page as Markdown: a table for each group of options."""
    lines = [OPENING, *(f"| {on.short} | {on.meaning} |" for on in OnResume)]
    for name, title in GROUPS.items():
        lines += ["", f"## {title[0].upper()}{title[1:]}", "", HEAD, "|---|---|---|---|---|"]
        for group, key, field in settings_of(RunConfig):
            if group == name:
                lines += [_row(key, field, option) for option in field.metadata["options"]]
    return "\n".join(lines) + "\n"


def _row(key: str, field: Field[Any], option: Option) -> str:
    written = option.flag_for(field)
    if is_switch(field) and field.default is not False:
        written += ", --no-" + written.removeprefix("--")
    value = option.words.get("metavar") or "|".join(option.words.get("choices", ()))
    value = value if isinstance(value, str) else " ".join(value)
    value = {"?": f"[{value}]", "+": f"{value} ...", "*": f"[{value} ...]"}.get(option.words.get("nargs", ""), value)
    written = f"`{written} {value}`".replace(" `", "`")
    cells = [written, option.meaning(), option.default(field), field.metadata["on_resume"].short, f"`{key}`"]
    return "| " + " | ".join(cell.replace("|", "\\|").replace("<", "\\<") for cell in cells) + " |"


if __name__ == "__main__":
    PAGE.write_text(options_page())
