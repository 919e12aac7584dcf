"""``spiking-lm lower``: a model as a program for neuromorphic hardware."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from numpy.typing import NDArray


def command(
    model: Path | None = typer.Argument(None, help="A model folder, a checkpoint or a run.", show_default=False),
    backend: str = typer.Option(..., "--backend", metavar="NAME", help="The hardware: 'plugins --hook backends'."),
    out: Path | None = typer.Option(None, "--out", metavar="DIR", help="The program folder to write."),
    settings: list[str] = typer.Option(
        [], "--set", metavar="OPTION=VALUE", help="Set an option of the backend, e.g. numerics=int8. May be repeated."
    ),
    setup: bool = typer.Option(
        False, "--setup", help="First install what runs the backend's programs and no extra can bring; needs no MODEL."
    ),
    json: bool = typer.Option(False, "--json", help="Print the report as JSON."),
) -> None:
    """Lower a model to hardware: a program that runs without torch.

    Every operation is placed. What cannot be is named, with the reason; nothing is left out silently. A backend that
    quantises looks at the embedded corpus. 'spiking-lm deploy DIR' runs the program.
    """
    from spiking_lm import checkpoints, doctor, hardware
    from spiking_lm.cli._output import console, errors, print_json
    from spiking_lm.cli.convert import read_settings
    from spiking_lm.data import load_tokenizer
    from spiking_lm.deployment import embedded_tokens
    from spiking_lm.errors import UsageError

    if setup:
        doctor.prepare(backend, lambda line: errors.print(line, markup=False, soft_wrap=True))
        if model is None:
            return
    if model is None or out is None:
        lacking = "a MODEL" if model is None else "--out DIR"
        raise UsageError(f"lower needs {lacking}", hint="spiking-lm lower MODEL --backend NAME --out DIR")
    folder = checkpoints.resolve_model(model)
    tokenizer = folder / "tokenizer.json"
    text = None
    if tokenizer.is_file():
        known = load_tokenizer(tokenizer)

        def text(n: int) -> NDArray[Any]:
            return embedded_tokens(known, n, "train")

    program = hardware.lower(checkpoints.load_model(folder), backend, text=text, **read_settings(settings))
    program.save(out, files={tokenizer.name: tokenizer.read_bytes()} if tokenizer.is_file() else {})
    report = program.report()
    if json:
        print_json({"model": str(folder), "program": str(out), "report": report.to_dict()})
    else:
        console.print(report.render())
        console.print(f"wrote {out}; run it with: spiking-lm deploy {out}", markup=False, soft_wrap=True)
