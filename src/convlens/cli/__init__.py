"""The command line: one thin command for each function of the API.

torch is imported only when a command needs it. Results go to stdout and everything else to stderr,
so that `--json` prints one object and nothing else.
"""

from __future__ import annotations

import atexit
import contextlib
import io
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from rich.markup import escape

from convlens.cli import analyze, explore, info, look, recipes, serve, train, weights
from convlens.cli.common import Figures, app
from convlens.errors import ConvlensError, Diverged, ResourceError, Stopped, UsageError
from convlens.utils import options, process
from convlens.utils.console import console, message_scope, status_handler
from convlens.utils.process import Terminated, raise_on_signals
from convlens.version import __version__

__all__ = [
    "analyze",
    "app",
    "exit_on_errors",
    "explore",
    "info",
    "look",
    "main",
    "recipes",
    "run",
    "serve",
    "train",
    "weights",
]

DISTRIBUTED_COMMANDS = ("train", "evaluate")  # commands that support torchrun
MAX_MESSAGE_CHARS = 200  # of the message of another library


def _print_version(requested: bool) -> None:
    if requested:
        sys.stdout.write(f"convlens {__version__}\n")
        raise typer.Exit


@app.callback()
def root(
    context: typer.Context,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show full Python tracebacks, for bug reports.")
    ] = False,
    figures: Figures = None,
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    """Train an image classifier on your own photos, test it honestly, and see why it decides.

    Start with `convlens train PHOTOS/`, a folder with one sub-folder per class. `convlens COMMAND
    -h` explains a command.

    Examples:
        convlens train photos/
        convlens predict photos-1a2b3c new.jpg
        convlens report photos-1a2b3c
    """
    if process.world_size() > 1 and context.invoked_subcommand not in DISTRIBUTED_COMMANDS:
        raise UsageError(
            f"{context.invoked_subcommand} does not support several processes",
            fix=f"run it without torchrun; only {' and '.join(DISTRIBUTED_COMMANDS)} support it",
        )
    if debug:
        options.update(debug=True)


def run() -> NoReturn:
    """Run `main` and end the process without freeing torch's objects.

    Python frees a million objects one by one before it exits, which takes 0.6 s of each command.
    The other steps of a regular exit are done here: waiting for threads, calling exit handlers and
    flushing the streams.
    """
    process.set_up()
    try:
        main()
    except SystemExit as end:
        # A regular exit for profilers, which write their result then, and for unwritable streams.
        if isinstance(end.code, int) and not (sys.getprofile() or sys.gettrace()):
            with contextlib.suppress(OSError, ValueError, AttributeError, KeyboardInterrupt):
                threading._shutdown()  # type: ignore[attr-defined]
                atexit._run_exitfuncs()
                sys.stdout.flush()
                _exit_now(end.code)
        raise


def _exit_now(code: int) -> NoReturn:
    """End the process at once, after flushing stderr."""
    # If the terminal is closed this fails, and Python would exit with 120.
    with contextlib.suppress(OSError):
        sys.stderr.flush()
    os._exit(code)


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run the command line and raise `SystemExit` with the documented exit code.

    typer itself exits with 130 after Ctrl-C, and with 1 if stdout is a closed pipe.
    """
    if process.global_rank() > 0:  # only rank 0 prints results
        sys.stdout = io.StringIO()
    elif isinstance(sys.stdout, io.TextIOWrapper):
        # File names need not be valid Unicode: invalid bytes are printed as \udcff, also in JSON.
        sys.stdout.reconfigure(errors="backslashreplace")
    with exit_on_errors():
        app(args=arguments)
    sys.exit(0)


@contextlib.contextmanager
def exit_on_errors() -> Iterator[None]:
    """Report the errors of a program as the command line does: a message and its exit code.

    Use it as a context manager or as a decorator in scripts that call convlens:

        @exit_on_errors()
        def main() -> None:
            convlens.train("digits")

    Raises:
        SystemExit: after an error that the user can fix. Bugs keep their traceback, and with
            `--debug` or `CONVLENS_DEBUG` all errors do.
    """
    before = options.update()
    try:
        with raise_on_signals(), status_handler(), message_scope():
            yield
    except Terminated as signalled:
        _fail(Stopped(f"asked to stop ({signalled})", fix="run the same command again"))
    except (ConvlensError, MemoryError, RuntimeError, OSError) as raised:
        error = _to_convlens_error(raised)
        if error is None or options.debug():
            raise
        _fail(error)
    finally:
        options.reset(before)


def _fail(error: ConvlensError) -> NoReturn:
    """Print the error and exit with its code."""
    if process.world_size() > 1:
        _fail_distributed(error)
    _print_error(error)
    sys.exit(error.exit_code)


def _to_convlens_error(error: Exception) -> ConvlensError | None:
    """Return the error to print, or None for a bug of convlens, which keeps its traceback."""
    if isinstance(error, ConvlensError):
        return error
    if "does not have a deterministic implementation" in str(error):
        return UsageError(
            f"--deterministic: {str(error).partition(',')[0]}"[:MAX_MESSAGE_CHARS],
            fix="leave out --deterministic, or use another network",
        )
    if isinstance(error, OSError):
        return _system_error(error)
    from convlens.engine import oom  # imports torch, which a RuntimeError has done before

    if oom.is_oom(error):
        return oom.out_of_memory_error(error)
    if "busy or unavailable" in str(error):
        return ResourceError(
            f"the GPU is busy: {str(error).splitlines()[0]}"[:MAX_MESSAGE_CHARS],
            fix="wait for the other program to finish, or choose another GPU (--device)",
        )
    # After a failed GPU or kernel, nothing on the device can be used in this process any more.
    if type(error).__name__ == "AcceleratorError" or "CUDA error" in str(error):
        return Stopped(
            f"the GPU failed: {str(error).splitlines()[0]}"[:MAX_MESSAGE_CHARS],
            fix="run the command again to resume from the last checkpoint; --debug shows where",
        )
    return None


def _system_error(error: OSError) -> ResourceError:
    """Turn an unexpected OSError, e.g. of a disk or a network, into a ResourceError."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    line = f"{Path(frame.filename).name}, line {frame.lineno}"
    return ResourceError(
        f"system error: {error.strerror or error}",
        where=line if error.filename is None else str(error.filename),
        fix="check the file and its disk, and run the command again; --debug shows the traceback",
    )


def _fail_distributed(error: ConvlensError) -> NoReturn:
    """Exit one of several processes.

    On each machine the first process that fails prints its error; the others exit with its code.
    """
    # torchrun sends SIGTERM to all when one has ended; that must not change the exit code.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    code = process.first_exit_code(error.exit_code)
    if code is None:
        _print_error(error)
        code = error.exit_code
    _exit_now(code)  # without waiting for threads, which may be waiting for other processes


def _print_error(error: ConvlensError) -> None:
    """Print the error on stderr, on any rank."""
    label = "stopped" if isinstance(error, Stopped | Diverged) else "error"
    print_line = console().print
    print_line(f"[bold red]{label}:[/] {escape(error.what)}")
    if error.where:
        print_line(f"  where: {escape(error.where)}")
    if error.fix:
        print_line(f"  do:    {escape(error.fix)}")
    console().file.flush()
