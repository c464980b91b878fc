"""Write docs/cli.md from the help of the command line: `python docs/make_cli.py`. A test checks that it is current."""

from __future__ import annotations

import contextlib
import io
import os
from pathlib import Path

from cprec import cli
from cprec.verbs import VERBS

PAGE = Path(__file__).with_name("cli.md")
WIDTH = "100"


def help_of(*arguments: str) -> str:
    """What `cprec ARGUMENTS --help` prints on a terminal of 100 columns."""
    before = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = WIDTH
    try:
        with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.suppress(SystemExit):
            cli.main([*arguments, "--help"])
    finally:
        if before is None:
            del os.environ["COLUMNS"]
        else:
            os.environ["COLUMNS"] = before
    return out.getvalue().strip()


def page() -> str:
    """The text of docs/cli.md."""
    parts = [
        "# The command line",
        "Made from `cprec VERB --help` by `python docs/make_cli.py`: change the docstrings of the settings, not this\n"
        "page. [tour.md](tour.md) shows how the verbs fit together.",
        f"```text\n{help_of()}\n```",
        "A setting that begins with the name of a stage (`pretrain.learning_rate=3e-4`) may be given to every verb\n"
        "that takes a recipe.",
    ]
    for verb in VERBS:
        parts += [f"## cprec {verb.name}", f"```text\n{help_of(verb.name)}\n```"]
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(f"wrote {PAGE}")
