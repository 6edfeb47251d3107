"""The `tandem` command: exit status 0 done, 1 failed at run time, 2 bad input."""

from __future__ import annotations

import signal
import sys
from typing import NoReturn

import typer
from typer._click.exceptions import UsageError

from cluster.cli import bench, chat, keys, operate, plan, serve, simulate
from engine.errors import BadInput, TandemError

DONE, FAILED, BAD_INPUT = 0, 1, 2
SIGNALLED = 128
"""And the signal's number."""

app = typer.Typer(
    name="tandem",
    help="Serves large language models with prefill and decode on separate pools.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for part in (serve, chat, operate, keys, bench, plan, simulate):
    part.register(app)


def main() -> NoReturn:
    """The process's boundary: every failure is one line on standard error and a status."""
    signal.signal(signal.SIGTERM, _end)
    sys.exit(run(sys.argv[1:]))


def _end(number: int, _frame: object) -> NoReturn:
    """Not at once: what a command began ends with it, as when it is interrupted."""
    sys.exit(SIGNALLED + number)


def run(arguments: list[str]) -> int:
    """One command; its exit status."""
    try:
        status = app(arguments, standalone_mode=False)
    except (typer.Abort, KeyboardInterrupt):
        return SIGNALLED + signal.SIGINT
    except UsageError as error:
        return _say(error.format_message(), BAD_INPUT)
    except BadInput as error:
        return _say(str(error), BAD_INPUT)
    except UnicodeEncodeError as error:
        # A shell passes any bytes on, which no message and no file of ours can hold.
        return _say(f"argument: {error.object!r}: must be text in UTF-8", BAD_INPUT)
    except TandemError as error:
        return _say(f"{type(error).__name__}: {error}", FAILED)
    return status if isinstance(status, int) else DONE


def _say(line: str, status: int) -> int:
    print(f"tandem: {' '.join(line.split())}", file=sys.stderr)
    return status
