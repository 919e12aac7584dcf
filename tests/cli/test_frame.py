"""The frame around the verbs: help, errors, exit codes, consoles. The verbs themselves are in test_verbs.py."""

from __future__ import annotations

import importlib
import inspect
import json
import os
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import typer

from spiking_lm import cli as frame
from spiking_lm import registry
from spiking_lm.cli import _output

Run = Callable[..., "subprocess.CompletedProcess[str]"]

HEAVY = ("torch", "snntorch", "numpy", "yaml", "tokenizers", "safetensors")


def test_help_lists_every_verb(cli: Run) -> None:
    shown = cli("--help")
    assert shown.returncode == 0
    assert shown.stderr == ""
    listed = [line.split()[0] for line in shown.stdout.partition("Commands:")[2].splitlines() if line[:3].strip()]
    assert listed[: len(frame.VERBS)] == list(frame.VERBS)


@pytest.mark.parametrize("arguments", [["--help"], [], ["--version"], ["recipes", "--help"], ["run", "--help"]])
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    shown = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", "from spiking_lm.cli import main; main()", *arguments],
        capture_output=True,
        text=True,
    )
    assert shown.returncode == 0
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in shown.stderr.splitlines()}
    assert "typer" in imported
    assert not imported.intersection(HEAVY)


@pytest.mark.parametrize("verb", [*frame.VERBS, "recipes ls", "recipes validate", "init plugin"])
def test_the_help_of_a_verb_imports_no_torch(verb: str) -> None:
    words = verb.split()
    code = f"""
        import sys
        from spiking_lm.cli import main
        try:
            main({[*words, "--help"]!r})
        except SystemExit as done:
            assert not done.code, done.code
        assert "torch" not in sys.modules
    """
    shown = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.startswith(f"Usage: spiking-lm {' '.join(words)}")


def test_help_takes_less_than_half_a_second(cli: Run) -> None:
    def processor_seconds() -> float:
        times = os.times()
        return times.children_user + times.children_system

    wall, processor = float("inf"), float("inf")
    for _ in range(8):  # other work on the machine can only slow it down
        start, before = time.perf_counter(), processor_seconds()
        cli("--help")
        wall, processor = min(wall, time.perf_counter() - start), min(processor, processor_seconds() - before)
        if wall < 0.5:
            return
    crowded = hasattr(os, "getloadavg") and os.getloadavg()[0] > (os.cpu_count() or 1)
    assert crowded, f"the fastest of eight took {wall:.2f} s"
    assert processor < 0.5, f"the machine is crowded, but it took {processor:.2f} s of processor time too"


@pytest.mark.parametrize("verb", frame.VERBS)
def test_a_summary_is_the_first_line_of_the_verb_s_own_help(verb: str) -> None:
    module = importlib.import_module(f"spiking_lm.cli.{verb}")
    text = module.app.info.help if hasattr(module, "app") else inspect.getdoc(module.command)
    assert text.partition("\n")[0].startswith(frame.VERBS[verb].removesuffix("."))
    assert f"spiking-lm {verb}" in (module.__doc__ or "")


@pytest.mark.parametrize("verb", frame.VERBS)
def test_every_option_says_what_it_does(verb: str) -> None:
    def options(command: object) -> list[object]:
        subcommands = getattr(command, "commands", {}).values()
        return [*command.params, *(p for sub in subcommands for p in options(sub))]  # type: ignore[attr-defined]

    for parameter in options(frame._load_verb(verb)):
        if getattr(parameter, "param_type_name", "") == "option":
            assert getattr(parameter, "help", None), f"{verb}: {parameter}"


# -- errors and exit codes --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "code", "message", "hint"),
    [
        (["runn"], 2, "no such command 'runn'", "did you mean 'run'?"),
        (["--nope"], 2, "no such option", "spiking-lm --help"),
        (["run", "--nope"], 2, "no such option", "spiking-lm run --help"),
        (["run"], 2, "no recipe was given", "recipes ls"),
        (["run", "spikegpt/quickstar"], 2, "unknown recipe", "did you mean 'spikegpt/quickstart'?"),
        (["run", "spikegpt/quickstart", "--set", "train.lr=1"], 2, "unknown field", "train.optimizer.lr"),
        (["run", "no.yaml"], 2, "cannot read no.yaml", "recipes ls"),
        (["run", "--resume", "nowhere"], 4, "nowhere is not a run", None),
        (["generate"], 2, "missing argument", "spiking-lm generate --help"),
        (["generate", "nowhere"], 4, "nowhere", None),
        (["generate", "nowhere", "--max-tokens", "0"], 2, "--max-tokens", None),
        (["eval", "nowhere"], 4, "nowhere", None),
        (["recipes", "show"], 2, "missing argument", "spiking-lm recipes show --help"),
        (["recipes", "sho"], 2, "no such command", "recipes --help"),
        (["recipes", "cp", "spikegpt/quickstart", "mine.txt"], 2, "ends in .yaml", "mine.txt.yaml"),
    ],
)
def test_an_error_is_two_lines_and_an_exit_code(
    cli: Run, arguments: list[str], code: int, message: str, hint: str | None
) -> None:
    shown = cli(*arguments)
    assert shown.returncode == code
    assert shown.stdout == ""
    lines = shown.stderr.splitlines()
    assert lines[0].startswith("error: ")
    assert message in lines[0]
    assert len(lines) <= 2
    if hint:
        assert lines[1].startswith("hint: ")
        assert hint in lines[1]


def test_a_missing_plugin_or_extra_is_exit_code_3(cli: Run, tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text("schema: 1\nname: r\nrequires: [nope]\ndata: {type: austen3}\nmodel: {type: nope}\n")
    shown = cli("run", str(recipe))
    assert shown.returncode == 3
    assert "needs the plugin 'nope'" in shown.stderr
    (tmp_path / "snntorch.py").write_text("raise ImportError('it is broken here')\n")
    blocked = "import sys; sys.modules['snntorch'] = None; from spiking_lm.cli import main; main()"
    shown = subprocess.run(
        [sys.executable, "-c", blocked, "recipes", "validate", "spikegpt/quickstart"], capture_output=True, text=True
    )
    assert shown.returncode == 3
    assert "pip install 'spiking-lm[spikegpt]'" in shown.stderr


def fake_verb(tmp_path: Path, body: str) -> dict[str, str]:
    """Return the environment in which the verb ``report`` is replaced by ``body``."""
    package = tmp_path / "sitecustomize.py"
    package.write_text(
        textwrap.dedent(f"""
        import sys, types
        module = types.ModuleType("spiking_lm.cli.report")
        def command() -> None:
            import os, signal, sys, time
            {body}
        module.command = command
        sys.modules["spiking_lm.cli.report"] = module
        """)
    )
    return {"PYTHONPATH": str(tmp_path)}


def test_a_bug_is_called_a_bug_and_the_traceback_can_be_seen(cli: Run, tmp_path: Path) -> None:
    env = fake_verb(tmp_path, "raise ValueError('[odd] value\\nin two lines')")
    shown = cli("report", env=env)
    assert shown.returncode == 1
    assert shown.stderr.splitlines() == [
        "error: ValueError: [odd] value in two lines",
        "hint: this is a bug; for the traceback: spiking-lm --debug report",
    ]
    shown = cli("--debug", "report", env=env)
    assert shown.returncode == 1
    assert "Traceback (most recent call last)" in shown.stderr
    assert "sitecustomize.py" in shown.stderr


def test_ctrl_c_is_exit_code_130(cli: Run, tmp_path: Path) -> None:
    shown = cli("report", env=fake_verb(tmp_path, "os.kill(os.getpid(), signal.SIGINT); time.sleep(5)"))
    assert shown.returncode == 130
    assert shown.stderr.strip() == "error: interrupted"
    assert "Traceback" in cli("--debug", "report", env=fake_verb(tmp_path, "raise KeyboardInterrupt")).stderr


def test_every_error_class_keeps_its_exit_code(cli: Run, tmp_path: Path) -> None:
    for name, code in (
        ("SpikingLMError", 1),
        ("UsageError", 2),
        ("PluginError", 3),
        ("DataError", 4),
        ("InterruptedRunError", 130),
    ):
        body = f"from spiking_lm import errors; raise errors.{name}('what [happened]', hint='do that')"
        shown = cli("report", env=fake_verb(tmp_path, body))
        assert (shown.returncode, shown.stderr) == (code, "error: what [happened]\nhint: do that\n")
        assert "Traceback" in cli("--debug", "report", env=fake_verb(tmp_path, body)).stderr


def test_a_full_disk_is_not_called_a_bug(cli: Run, tmp_path: Path) -> None:
    shown = cli("report", env=fake_verb(tmp_path, "raise OSError(28, 'No space left on device', 'the/file')"))
    assert shown.returncode == 1
    assert "no space left on the disk: the/file" in shown.stderr
    assert "bug" not in shown.stderr


def test_what_a_verb_returns_is_no_exit_code(cli: Run, tmp_path: Path) -> None:
    assert cli("report", env=fake_verb(tmp_path, "return 7")).returncode == 0


# -- consoles ---------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(os.name == "nt", reason="needs a shell with pipes")
def test_a_reader_that_goes_away_is_no_news(tmp_path: Path) -> None:
    env = fake_verb(tmp_path, "[print('x' * 1000) for _ in range(1000)]")
    for verb in ("report", "--help", "recipes show spikegpt/austen"):
        command = f"{sys.executable} -c 'from spiking_lm.cli import main; main()' {verb} | true"
        shown = subprocess.run(
            command, shell=True, capture_output=True, text=True, env={**os.environ, **(env if verb == "report" else {})}
        )
        assert shown.stderr == ""


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
def test_a_console_without_unicode_is_no_obstacle(cli: Run, encoding: str, tmp_path: Path) -> None:
    env = {"PYTHONIOENCODING": encoding, "PYTHONUTF8": "0"}
    assert cli("recipes", "ls", env=env).returncode == 0
    body = "print('κόσμε \\u2588'); from spiking_lm.cli._output import table; table('t', ['ä'], [['✓']])"
    shown = subprocess.run(
        [sys.executable, "-c", "from spiking_lm.cli import main; main()", "report"],
        capture_output=True,
        env={**os.environ, **env, **fake_verb(tmp_path, body)},
    )
    assert (shown.returncode, shown.stderr) == (0, b"")


def test_without_a_terminal_there_is_no_colour(cli: Run) -> None:
    for verb in (["recipes", "ls"], ["plugins"], ["--help"]):
        assert "\x1b" not in cli(*verb, env={"TERM": "xterm-256color"}).stdout


@pytest.mark.skipif(os.name == "nt", reason="needs a pseudo-terminal")
def test_no_color_is_obeyed_on_a_terminal() -> None:
    import pty

    def on_terminal(**env: str) -> bytes:
        leader, follower = pty.openpty()
        code = "from spiking_lm.cli._output import console; console.print('[red]hello[/]')"
        variables = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "FORCE_COLOR", "CI")}
        with subprocess.Popen(
            [sys.executable, "-c", code], stdout=follower, env={**variables, "TERM": "xterm-256color", **env}
        ) as process:
            process.wait()
        os.close(follower)
        shown = os.read(leader, 10_000)
        os.close(leader)
        return shown

    assert b"\x1b[31m" in on_terminal()
    assert b"\x1b" not in on_terminal(NO_COLOR="1")


def test_tables_show_cells_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    _output.table("title", ["name", "n"], [["pip install 'x[y]'", 3], [None, 0.123456]])
    shown = capsys.readouterr().out
    assert "pip install 'x[y]'" in shown
    assert "0.1235" in shown


def test_json_is_ascii_and_strict(capsys: pytest.CaptureFixture[str]) -> None:
    _output.print_json({"é": float("nan"), "p": Path("x"), "s": {2, 1}})
    shown = capsys.readouterr().out
    assert shown.isascii()
    assert json.loads(shown) == {"é": None, "p": "x", "s": [1, 2]}


# -- plugins' verbs ---------------------------------------------------------------------------------------------------


def install(folder: Path, name: str, verb: str) -> None:
    """Make ``folder``, on the path, hold a distribution with a plugin that offers one verb."""
    (folder / f"{name}.py").write_text(
        textwrap.dedent(f"""
        import spiking_lm
        from spiking_lm.records import CommandSpec

        @spiking_lm.hookimpl
        def spiking_lm_commands(register):
            register(CommandSpec(name="{verb}", summary="Say hello.", function="{name}:hello"))

        def hello(who: str, loud: bool = False):
            "Say hello to WHO."
            print(f"hello {{who}}" + "!" * loud)
        """)
    )
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[spiking_lm]\n{name} = {name}\n")


def test_the_verb_of_a_plugin_works_like_ours(cli: Run, tmp_path: Path) -> None:
    install(tmp_path, "greeter", "greet")
    env = {"PYTHONPATH": str(tmp_path)}
    assert "greet     Say hello." in cli("--help", env=env).stdout
    assert cli("greet", "you", "--loud", env=env).stdout == "hello you!\n"
    assert cli("greet", env=env).returncode == 2
    assert "did you mean 'greet'?" in cli("gret", env=env).stderr
    assert "greet" not in cli("--no-plugins", "--help", env=env).stdout
    assert cli("--no-plugins", "greet", "you", env=env).returncode == 2


def test_a_plugin_cannot_take_our_verb(cli: Run, tmp_path: Path) -> None:
    install(tmp_path, "thief", "recipes")
    shown = cli("recipes", "ls", env={"PYTHONPATH": str(tmp_path)})
    assert shown.returncode == 0
    assert "spikegpt/quickstart" in shown.stdout


def test_plugin_verbs_are_looked_up_in_the_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "all", lambda kind: {} if kind == "commands" else pytest.fail(kind))
    command = frame._application()
    context = typer.Context(command)
    assert command.list_commands(context) == list(frame.VERBS)
