"""``spiking-lm convert``: checkpoints of the papers' own code, in and out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer


def command(
    source: Path = typer.Argument(
        ..., help="A .pth, .safetensors or .gguf file, a Hugging Face folder, or a model folder or run."
    ),
    out: Path = typer.Argument(..., help="The model folder to write; a file with --to reference."),
    to: str | None = typer.Option(
        None, "--to", metavar="NAME", help="The model it is of (recognised when left out), or 'reference'."
    ),
    tokenizer: Path | None = typer.Option(
        None, "--tokenizer", metavar="FILE", help="Store this tokenizer.json or character vocabulary with the model."
    ),
    recipe: str | None = typer.Option(
        None, "--recipe", metavar="RECIPE", help="Convert as the recipe's convert stage says, with its evaluation."
    ),
    settings: list[str] = typer.Option(
        [],
        "--set",
        metavar="FIELD=VALUE",
        help="Set what the file does not tell, e.g. ctx_len=1024; of a recipe any field. May be repeated.",
    ),
    json: bool = typer.Option(False, "--json", help="Print the result as JSON."),
) -> None:
    """Convert a checkpoint of a paper's own code, or of another tool, to a spiking-lm model.

    Nothing in SOURCE is executed: a file that holds more than tensors is refused. The result is read back and compared.
    With --to reference, SOURCE is a model of ours and OUT a .pth or .safetensors file in its paper's keys.

    With --recipe the model is also changed: calibrated on text, quantised, evaluated. The run is kept in ./runs; the
    same command goes on with one that was interrupted.
    """
    from spiking_lm.cli import _output
    from spiking_lm.convert import convert

    if recipe is not None:
        _by_recipe(source, out, recipe, settings, to=to, tokenizer=tokenizer, as_json=json)
        return
    done = convert(source, out, to=to, tokenizer=tokenizer, options=read_settings(settings))
    if json:
        _output.print_json(vars(done))
        return
    print_ = _output.console.print
    print_(f"{done.source} -> {done.out}")
    print_(f"  model       {done.model_type}, {done.parameters:,} parameters")
    if done.source_sha256:
        print_(f"  source      sha256 {done.source_sha256}")
    print_(f"  written     sha256 {done.sha256}")
    if done.compared is not None:
        print_(f"  read back   {done.equal} of {done.compared} tensors equal the source's, bit for bit")


def _by_recipe(
    source: Path,
    out: Path,
    recipe: str,
    settings: list[str],
    *,
    to: str | None,
    tokenizer: Path | None,
    as_json: bool,
) -> None:
    from spiking_lm.cli import _output
    from spiking_lm.convert import convert_by_recipe
    from spiking_lm.errors import UsageError
    from spiking_lm.rundir import read_json

    if tokenizer is not None:
        raise UsageError("--tokenizer: a recipe takes the tokenizer of the source", hint="leave out --tokenizer")
    run = convert_by_recipe(source, out, recipe, settings, to=to, console=_output.errors)
    if as_json:
        _output.print_json({"out": str(out), "run": str(run.path), **read_json(run.path / "conversion.json")})
        return
    _output.console.print(f"{source} -> {out}\n  run         {run.path}", highlight=False, soft_wrap=True)


def read_settings(settings: list[str]) -> dict[str, Any]:
    """Read ``["neuron.type=lif", "ctx_len=64"]`` into nested options, values as YAML."""
    from spiking_lm import safeyaml
    from spiking_lm.errors import UsageError

    options: dict[str, Any] = {}
    for text in settings:
        key, equals, value = text.partition("=")
        *parents, name = key.strip().split(".")
        if not equals or not all([*parents, name]):
            raise UsageError(f"--set {text!r}: cannot be understood", hint="write --set field=value")
        place = options
        for parent in parents:
            place = place.setdefault(parent, {})
        place[name] = safeyaml.parse(value, where=f"--set {key}")
    return options
