"""The command line: ``subspace-meta train | evaluate | archive | weights | memory | bench | doctor``, a file a command.

Errors of the user are one line on stderr and exit code 2. Files are written atomically, so an error or Ctrl-C leaves
nothing half-written.
"""

from __future__ import annotations

import sys
import warnings
from typing import Annotated, Any

try:
    import rich  # noqa: F401
    import typer
except ImportError as error:  # the library itself does not need them
    raise SystemExit(f"subspace-meta: {error}; install the extra: pip install 'subspace-meta[train]'") from error

from subspace_meta._version import __version__
from subspace_meta.checkpoint import CheckpointError
from subspace_meta.cli import archive, bench, doctor, evaluate, show, train
from subspace_meta.cli.common import UsageError
from subspace_meta.meta.distributed import ProcessError, Processes
from subspace_meta.meta.trainer import TrainingError

app = typer.Typer(
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Meta-train and evaluate a learned Riemannian optimizer.",
)
app.command("train")(train.train_command)
app.command("evaluate")(evaluate.evaluate_command)
app.command("archive")(archive.archive_command)
app.command("memory")(show.memory_command)
app.command("weights")(show.weights_command)
app.command("doctor")(doctor.doctor_command)
measuring = typer.Typer(rich_markup_mode=None, help="Measure this machine, side by side with other libraries.")
app.add_typer(measuring, name="bench")
measuring.command("geometry")(bench.bench_geometry_command)
measuring.command("step")(bench.bench_step_command)
measuring.command("predecessor")(bench.bench_predecessor_command)
measuring.command("meta")(bench.bench_meta_command)


@app.callback(invoke_without_command=True)
def _options(
    context: typer.Context, version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False
) -> None:
    if version:
        typer.echo(__version__)
    elif context.invoked_subcommand is None:
        typer.echo(context.get_help())


AFTER_STOP = {
    "train": "; a run that had begun goes on with: train --name NAME --resume",
    "archive": "; finished cells are kept, the same command goes on",
}


def main() -> None:
    """Run the command line; errors of the user are one line on stderr and exit code 2."""
    # torch's own compiler calls what torch has deprecated; the user can do nothing about it.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.")
    warnings.filterwarnings("ignore", category=FutureWarning, message=r".torch\._prims_common\.check. is deprecated")
    try:
        code = app(standalone_mode=False)
    except typer.TyperException as error:
        message = error.format_message() if hasattr(error, "format_message") else str(error)
        code = _complain(f"{message} {_help_for(getattr(error, 'ctx', None), message)}")
    except (UsageError, CheckpointError, TrainingError, ProcessError, ImportError, OSError) as error:
        code = _complain(str(error))
    except (KeyboardInterrupt, typer.Abort):
        code = 130
    finally:
        Processes.leave()  # gloo's threads, left running, may abort the interpreter as it ends
    if code == 130:  # what typer, too, makes of Ctrl-C
        _complain(f"stopped{AFTER_STOP.get(next(iter(sys.argv[1:]), ''), '')}")
    sys.exit(code if isinstance(code, int) else 0)


def _help_for(context: Any, message: str) -> str:
    """Return the command whose help says what would be right, and the commands that there are where one is wrong.

    Args:
        context: typer's, of the command; ``None``: it is not known.
        message: what is wrong.
    """
    commands = getattr(getattr(context, "command", None), "commands", {}) if "command" in message else {}
    names: list[str] = []
    while context is not None and context.parent is not None:
        names.insert(0, str(context.info_name))
        context = context.parent
    there = f"There are {', '.join(commands)} " if commands else ""
    return f"{there}(see {' '.join(['subspace-meta', *names, '--help'])})"


def _complain(message: str) -> int:
    typer.echo("subspace-meta: " + " ".join(message.split()), err=True)
    return 2
