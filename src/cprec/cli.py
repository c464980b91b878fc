"""The command line: parse the arguments, call the verb, and turn errors into messages and exit codes."""

from __future__ import annotations

import argparse
import io
import os
import shlex
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from cprec import __version__
from cprec.errors import ConfigError, CPRecError
from cprec.machine import is_busy
from cprec.verbs import VERBS

EXIT_ERROR, EXIT_CONFIG, EXIT_INTERRUPTED = 1, 2, 130
EXIT_CODES = {ConfigError: EXIT_CONFIG, KeyboardInterrupt: EXIT_INTERRUPTED, Exception: EXIT_ERROR}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0, 1 (it failed), 2 (a setting is wrong) or 130 (interrupted)."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    _write_any_character()
    _wait_without_spinning()
    debug = "--debug" in arguments
    try:
        options = _parsed(arguments)
        if options.verb is None:
            _parser().print_help()
            return EXIT_CONFIG
        with warnings.catch_warnings():
            if not debug:
                warnings.showwarning = _brief_warnings(warnings.showwarning)
            options.call(options)
        sys.stdout.flush()
        return 0
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (CPRecError, OSError, KeyboardInterrupt) as error:
        if debug:
            raise
        if isinstance(error, KeyboardInterrupt):
            again = shlex.join(["cprec", *arguments])
            message = f"\ncprec: interrupted. What is complete is kept; to go on from there: {again}"
        else:
            # An OSError is a folder that cannot be written, a disk that is full.
            message = f"cprec: error: {error}{' (--debug shows where)' if isinstance(error, OSError) else ''}"
        print(message, file=sys.stderr)
        return next(code for kind, code in EXIT_CODES.items() if isinstance(error, kind))


def _wait_without_spinning() -> None:
    """On a busy machine, let threads that wait for each other sleep, unless the environment says how they wait.

    OpenMP, by which PyTorch computes, reads this when it is loaded. By itself it spins, and where another program has a
    core, threads spin away the time of the one that all wait for (docs/pitfalls.md).
    """
    if is_busy() and not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys():
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"


def _write_any_character() -> None:
    """Write a character that the encoding of a console or pipe lacks as an escape."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors in ("strict", "surrogateescape"):
            stream.reconfigure(errors="backslashreplace")


def _brief_warnings(show: Callable[..., None]) -> Callable[..., None]:
    """Show a warning of this package as one line; leave those of other packages to `show`."""

    def showwarning(message: Warning | str, category: type[Warning], filename: str, *rest: Any) -> None:
        if category is UserWarning and filename.startswith(os.path.dirname(__file__) + os.sep):
            print(f"cprec: warning: {message}", file=sys.stderr)
        else:
            show(message, category, filename, *rest)

    return showwarning


# ---- parsing and help ------------------------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    """An argparse parser that raises ConfigError for wrong arguments, and makes its help only when asked for it."""

    make_help: Callable[[], str] | None = None

    def error(self, message: str) -> Any:
        raise ConfigError(f"{message}; see {self.prog} --help")

    def format_help(self) -> str:
        return self.make_help() if self.make_help is not None else super().format_help()


def _parsed(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse the arguments; settings may stand before, between and after options."""
    options, rest = _parser().parse_known_args(arguments)
    for word in rest:
        if word.startswith("-"):
            name = word.strip("-").partition("=")[0].replace("-", "_")
            raise ConfigError(f"there is no option {word}; settings have no dashes, as in {name}=VALUE")
    if rest:
        if not hasattr(options, "settings"):
            raise ConfigError(
                f"{' '.join(rest)}: more than cprec {options.verb} takes; see cprec {options.verb} --help"
            )
        options.settings = [*options.settings, *rest]
    return options


def _parser() -> _Parser:
    parser = _Parser(prog="cprec", allow_abbrev=False)
    parser.make_help = _main_help
    parser.add_argument("--version", action="version", version=f"cprec {__version__}")
    parser.add_argument("--debug", action="store_true", default=False)
    commands = parser.add_subparsers(dest="verb", metavar="VERB", parser_class=_Parser)
    for verb in VERBS:
        command = commands.add_parser(verb.name, allow_abbrev=False)
        command.add_argument("--debug", action="store_true", default=argparse.SUPPRESS)
        command.make_help = verb.help
        command.set_defaults(call=verb.call)
        verb.add_arguments(command)
    return parser


def _main_help() -> str:
    rows = "\n".join(f"  {verb.name:<10} {verb.summary}" for verb in VERBS)
    return f"""\
usage: cprec VERB RECIPE_OR_YAML [key=value ...]

CPRec: all-domain continual pre-training of language models for recommendation.

verbs:
{rows}

options:
  --help     this text; cprec VERB --help lists every setting of a verb
  --version  print the version
  --debug    show the traceback of an error

RECIPE_OR_YAML is the name of a recipe (cprec run --help lists them), a YAML file with `recipe: NAME` and what to
change, a YAML file with every setting, or the run.json of an earlier run.
"""
