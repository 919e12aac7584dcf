"""The ``spiking-lm`` command: one module per verb, imported only when that verb is invoked."""

from __future__ import annotations

import contextlib
import errno
import importlib
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from spiking_lm.errors import InterruptedRunError, SpikingLMError, did_you_mean

# Name -> summary, in the order of the help page. A verb lives in spiking_lm.cli.<name>: a function `command`, or a
# Typer `app` when it has sub-commands. The summaries stand here so that the help page imports none of them.
VERBS = {
    "run": "Run a recipe: every stage from training to the report, in one run directory.",
    "train": "Train the model of a recipe, and stop there.",
    "sweep": "Run a recipe at every combination of some values, and print one table.",
    "eval": "Score a model on text, labelled examples or multiple-choice questions that it has not seen.",
    "generate": "Write text with a model, as it comes.",
    "chat": "Write text with a model, turn by turn, keeping its state between turns.",
    "explain": "Say where a model's spikes are, and what they save.",
    "lower": "Lower a model to hardware: a program that runs without torch.",
    "deploy": "Run a program: how well it predicts, and what it would cost.",
    "report": "Write the HTML report of a run.",
    "bench": "Run benchmarks on this machine.",
    "convert": "Convert a checkpoint of a paper's own code, or of another tool, to a spiking-lm model.",
    "recipes": "List, show, copy and check recipes.",
    "plugins": "List the plugins, and say what is wrong with those that do not work.",
    "init": "Write the skeleton of a plugin or of a recipe.",
    "doctor": "Check the installation, and say how to mend what is wrong.",
}

# Newer versions of typer carry their own click, older ones use the installed one; this is the base of its errors.
_ClickException: Any = next(cls for cls in typer.BadParameter.__mro__ if cls.__name__ == "ClickException")

_PLAIN: dict[str, Any] = {"rich_markup_mode": None, "add_completion": False}
"""Help pages are plain text: quick, readable in a pipe, and safe on consoles that know no box-drawing characters."""


class _Verbs(TyperGroup):
    """The verbs, each loaded when it is resolved; listing them gives stubs that only carry a summary."""

    def list_commands(self, ctx: Any) -> list[str]:
        return [*VERBS, *_plugin_commands()]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        summary = VERBS.get(cmd_name) or _plugin_commands().get(cmd_name)
        if summary is None:
            return None
        return TyperCommand(cmd_name, short_help=summary, help=summary, rich_markup_mode=None)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name = args[0]
        if not name.startswith("-"):
            if name in VERBS:
                return name, _load_verb(name), args[1:]
            if name in _plugin_commands():
                return name, _load_plugin_command(name), args[1:]
            ctx.fail(f"no such command {name!r}.\n{did_you_mean(name, self.list_commands(ctx)) or ''}")
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: Any) -> int:
        try:
            super().invoke(ctx)
        except KeyboardInterrupt as interrupt:  # typer's own handling of it differs from version to version
            raise InterruptedRunError("interrupted") from interrupt
        return 0  # what a verb returns is for Python callers; its exit code is typer.Exit or an error


def _load_verb(name: str) -> Any:
    module = importlib.import_module(f"spiking_lm.cli.{name}")
    return _command(name, module.app if hasattr(module, "app") else module.command)


def _plugin_commands() -> dict[str, str]:
    from spiking_lm import registry

    return {name: entry.spec.summary for name, entry in registry.all("commands").items() if name not in VERBS}


def _load_plugin_command(name: str) -> Any:
    from spiking_lm import registry

    return _command(name, registry.get("commands", name).load("function"))


def _command(name: str, target: Any) -> Any:
    """Return the click command of a verb's function or Typer."""
    if not isinstance(target, typer.Typer):
        single = typer.Typer(**_PLAIN)
        single.command(name)(target)
        target = single
    command = typer.main.get_command(target)
    command.name = name
    return command


def new_app(help: str) -> typer.Typer:
    """Return the Typer of a verb that has sub-commands."""
    return typer.Typer(help=help, no_args_is_help=True, **_PLAIN)


def _show_version(wanted: bool) -> None:
    if wanted:
        from spiking_lm import __version__

        typer.echo(f"spiking-lm {__version__}")
        raise typer.Exit


def _application() -> Any:
    app = typer.Typer(cls=_Verbs, no_args_is_help=True, **_PLAIN)

    @app.callback()
    def spiking_lm(
        version: bool = typer.Option(
            False, "--version", callback=_show_version, is_eager=True, help="Show the version."
        ),
        debug: bool = typer.Option(False, "--debug", help="Show the traceback of an error."),
        no_plugins: bool = typer.Option(False, "--no-plugins", help="Load no plugin but spiking-lm's own."),
    ) -> None:
        """Train, evaluate, explain and deploy spiking language models.

        'spiking-lm VERB --help' says what a verb takes. Start with 'spiking-lm recipes ls'.
        """

    return typer.main.get_command(app)


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line and exit: 0 ok, 1 failure, 2 usage, 3 plugin, 4 data, 130 interrupted."""
    arguments = list(sys.argv[1:] if args is None else args)
    _forgive_narrow_consoles()
    code = _guarded(arguments)
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        _silence_stdout()
    sys.exit(code)


def _guarded(arguments: list[str]) -> int:
    """Run ``arguments``; turn every error into two lines on standard error, and return the exit code."""
    own_options = arguments[: next((i for i, word in enumerate(arguments) if not word.startswith("-")), len(arguments))]
    debug = "--debug" in own_options
    if "--no-plugins" in own_options:
        os.environ["SPIKING_LM_NO_PLUGINS"] = "1"  # for the registry, and for processes that we start
    try:
        return int(_application().main(arguments, prog_name="spiking-lm", standalone_mode=False) or 0)
    except SpikingLMError as error:
        _show_error(error.message, error.hint, debug)
        return error.exit_code
    except _ClickException as error:
        if type(error).__name__ == "NoArgsIsHelpError":
            typer.echo(error.format_message())
            return 0
        _show_usage_error(error, arguments)
        return int(error.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        _show_error("interrupted", None, debug)
        return 130
    except BrokenPipeError:
        _silence_stdout()
        return 1
    except OSError as error:
        if error.errno == errno.ENOSPC:
            _show_error(f"no space left on the disk: {error.filename or 'while writing'}", "free some space", debug)
            return 1
        _show_bug(error, arguments, debug)
        return 1
    except Exception as error:
        _show_bug(error, arguments, debug)
        return 1


def _show_error(message: str, hint: str | None, debug: bool) -> None:
    if debug:
        import traceback

        traceback.print_exc()
    typer.echo(f"error: {message}", err=True)
    if hint:
        typer.echo(f"hint: {hint}", err=True)


def _show_usage_error(error: Any, arguments: list[str]) -> None:
    message, _, more = error.format_message().rstrip().partition("\n")
    message = message[:1].lower() + message[1:]
    context = getattr(error, "ctx", None)
    help_page = f"'{context.command_path if context else 'spiking-lm'} --help' says what is accepted"
    _show_error(message.rstrip("."), more or help_page, debug=False)


def _show_bug(error: Exception, arguments: list[str], debug: bool) -> None:
    text = " ".join(str(error).split())
    again = shlex.join(["spiking-lm", "--debug", *arguments])
    _show_error(
        f"{type(error).__name__}: {text}" if text else type(error).__name__,
        "this is a bug" if debug else f"this is a bug; for the traceback: {again}",
        debug,
    )


def _forgive_narrow_consoles() -> None:
    """Print a replacement character where the console's encoding lacks one, instead of failing."""
    for stream in (sys.stdout, sys.stderr):
        reconfigure: Callable[..., None] | None = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            with contextlib.suppress(ValueError, OSError):
                reconfigure(errors="replace")


def _silence_stdout() -> None:
    """The reader of our output went away: let the interpreter's last flush go nowhere."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


__all__ = ["VERBS", "main", "new_app"]
