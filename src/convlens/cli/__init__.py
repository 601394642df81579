"""The command line: one thin command for each function of the API.

Nothing imports torch before a command needs it. Results go to stdout, everything else to stderr,
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
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from rich.markup import escape

from convlens.cli import analyze, info, look, train
from convlens.cli.common import Figures, app
from convlens.errors import ConvlensError, Diverged, ResourceError, Stopped, UsageError
from convlens.utils import options, process
from convlens.utils.console import console, status_handler
from convlens.utils.process import Terminated, raise_on_signals
from convlens.version import __version__

__all__ = ["app", "basics", "info", "inside", "judging", "main", "run"]

SHARED = ("train", "evaluate")  # commands that support torchrun


def _version(wanted: bool) -> None:
    if wanted:
        sys.stdout.write(f"convlens {__version__}\n")
        raise typer.Exit


@app.callback()
def root(
    context: typer.Context,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks of errors.")] = False,
    figures: Figures = None,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Train, test and look inside convolutional image classifiers.

    `convlens COMMAND -h` describes a command.

    Examples:
        convlens train digits
        convlens predict digits seven.png
        convlens report digits
    """
    if process.world_size() > 1 and context.invoked_subcommand not in SHARED:
        raise UsageError(
            f"{context.invoked_subcommand} is not for several processes",
            fix=f"run it without torchrun; only {' and '.join(SHARED)} support it",
        )
    if debug:
        options.update(debug=True)


def run() -> NoReturn:
    """`main` for a process of its own, which ends without taking torch apart.

    Python frees a million objects one by one before it ends, for 0.6 s of each command. What else
    it does then is done here: waiting for threads, exit handlers, emptying the streams.
    """
    process.set_up()
    try:
        main()
    except SystemExit as end:
        # A profiler wants to have the last word, and so does a stream that can't be written to.
        if isinstance(end.code, int) and not (sys.getprofile() or sys.gettrace()):
            with contextlib.suppress(OSError, ValueError, AttributeError, KeyboardInterrupt):
                threading._shutdown()  # type: ignore[attr-defined]
                atexit._run_exitfuncs()
                sys.stdout.flush()
                _leave(end.code)
        raise


def _leave(code: int) -> NoReturn:
    """Ends the process here and now, after what stands in the buffer of stderr."""
    # Where the terminal is gone nobody reads that; Python would end with 120 because of it.
    with contextlib.suppress(OSError):
        sys.stderr.flush()
    os._exit(code)


def main(arguments: list[str] | None = None) -> NoReturn:
    """Runs the command line and ends with the documented exit code (`SystemExit`).

    typer itself ends with 2 for a wrong option, with 130 for Ctrl-C, and with 1 where nobody reads
    what is printed any more.
    """
    if process.global_rank() > 0:  # of several processes the first one speaks
        sys.stdout = io.StringIO()
    elif isinstance(sys.stdout, io.TextIOWrapper):
        # Names of files need not be text: half characters are written as \udcff, also in JSON.
        sys.stdout.reconfigure(errors="backslashreplace")
    before = options.update()
    try:
        with raise_on_signals(), status_handler():
            app(args=arguments)
    except Terminated as signalled:
        _end(Stopped(f"asked to stop ({signalled})", fix="run the same command again"))
    except (ConvlensError, MemoryError, RuntimeError, OSError) as raised:
        error = _explained(raised)
        if error is None or options.debug():
            raise
        _end(error)
    finally:
        options.reset(before)
    sys.exit(0)


def _end(error: ConvlensError) -> NoReturn:
    """Print the error and exit with its code."""
    if process.world_size() > 1:
        _fail_with_others(error)
    _show(error)
    sys.exit(error.exit_code)


def _explained(error: Exception) -> ConvlensError | None:
    """Return the error to print; None for a bug of convlens, which keeps its traceback."""
    if isinstance(error, ConvlensError):
        return error
    if "does not have a deterministic implementation" in str(error):
        return UsageError(
            f"--deterministic: {str(error).partition(',')[0]}"[:200],
            fix="leave out --deterministic, or use another network",
        )
    if isinstance(error, OSError):
        return _of_the_system(error)
    from convlens.engine import oom  # torch; who ran out of memory has imported it

    if oom.is_oom(error):
        return oom.out_of_memory_error(error)
    if "busy or unavailable" in str(error):
        return ResourceError(
            f"the GPU is busy: {str(error).splitlines()[0]}"[:200],
            fix="wait for the other program to finish, or choose another GPU (--device)",
        )
    # After a lost GPU or a failed kernel, nothing on the device can be used in this process.
    if type(error).__name__ == "AcceleratorError" or "CUDA error" in str(error):
        return Stopped(
            f"the GPU failed: {str(error).splitlines()[0]}"[:200],
            fix="run the command again to resume from the last checkpoint; --debug shows where",
        )
    return None


def _of_the_system(error: OSError) -> ResourceError:
    """Turn an unexpected OSError, of a disk or a network, into a ResourceError."""
    at = traceback.extract_tb(error.__traceback__)[-1]
    run_dir = f"{Path(at.filename).name}, line {at.lineno}"
    return ResourceError(
        f"the system refused: {error.strerror or error}",
        where=run_dir if error.filename is None else str(error.filename),
        fix="check the file and its disk, and run the command again; --debug shows the traceback",
    )


def _fail_with_others(error: ConvlensError) -> NoReturn:
    """End one of several processes: on each machine the first that fails prints its error.

    The others exit with its code.
    """
    # torchrun sends SIGTERM to all when one has ended; that must not change the exit code.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    code = process.first_exit_code(error.exit_code)
    if code is None:
        _show(error)
        code = error.exit_code
    _leave(code)  # without waiting for threads: others may wait in the middle of a step


def _show(error: ConvlensError) -> None:
    """Print the error on stderr, whichever rank this is: the first one that fails calls this."""
    label = "stopped" if isinstance(error, Stopped | Diverged) else "error"
    show = console().print
    show(f"[bold red]{label}:[/] {escape(error.what)}")
    if error.where:
        show(f"  where: {escape(error.where)}")
    if error.fix:
        show(f"  do:    {escape(error.fix)}")
    console().file.flush()
