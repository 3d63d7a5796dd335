"""The command line as a user meets it: exit codes, one-line errors, nothing overwritten."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import typer
import yaml
from typer.testing import CliRunner

from pipeline.errors import PipeError, Stopped
from stages import cli

COMMANDS = ["init", "index", "extract-teacher", "train", "evaluate", "export", "embed", "demo"]


def pipe(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "stages.cli", *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=120)


def one_error_line(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 1, done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    return errors[0]


def test_help_names_every_command_and_imports_nothing_heavy(tmp_path):
    code = (
        "import sys; from typer.testing import CliRunner; from stages.cli import app\n"
        "print(CliRunner().invoke(app, ['--help']).output)\n"
        "print('HEAVY', sorted({'torch', 'pydantic', 'numpy', 'pyarrow', 'zarr'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert all(command in done.stdout for command in COMMANDS)
    assert "HEAVY []" in done.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_without_a_config(command, tmp_path):
    started = time.monotonic()
    result = CliRunner().invoke(cli.app, [command, "--help"])
    assert result.exit_code == 0
    assert "--debug" in result.output
    assert time.monotonic() - started < 2


@pytest.mark.parametrize("command", ["index", "extract-teacher", "train", "evaluate"])
def test_a_missing_config_says_how_to_write_one(command, tmp_path):
    assert "pipe init --data SOURCE" in one_error_line(pipe(command, cwd=tmp_path))


def test_wrong_usage_is_2(tmp_path):
    assert pipe("train", "--ordr", "3", cwd=tmp_path).returncode == 2
    assert pipe("train", "--order", "-1", cwd=tmp_path).returncode == 2
    assert pipe("trian", cwd=tmp_path).returncode == 2


def test_init_writes_a_config_that_the_other_commands_accept(tmp_path):
    done = pipe("init", "--data", "tars/*.tar", "--preset", "small", "--set", "train.lr=0.5", cwd=tmp_path)
    assert done.returncode == 0
    written = yaml.safe_load((tmp_path / "pipe.yaml").read_text())
    assert written["data"]["source"] == str(tmp_path / "tars" / "*.tar")
    assert written["train"]["lr"] == 0.5
    assert written["model"]["image_size"] == 112
    line = one_error_line(pipe("train", cwd=tmp_path))
    assert "there is no manifest" in line
    assert "pipe index" in line


def test_init_never_replaces_a_file(tmp_path):
    (tmp_path / "pipe.yaml").write_text("precious: true\n")
    assert "exists already" in one_error_line(pipe("init", "--data", "x", cwd=tmp_path))
    assert (tmp_path / "pipe.yaml").read_text() == "precious: true\n"


def test_init_refuses_an_unknown_key_before_it_writes(tmp_path):
    line = one_error_line(pipe("init", "--data", "x", "--set", "train.ordr=3", cwd=tmp_path))
    assert "train.ordr is unknown (nearest: train.order)" in line
    assert not (tmp_path / "pipe.yaml").exists()


def test_the_environment_names_a_config(tmp_path, monkeypatch):
    (tmp_path / "other.yaml").write_text("train: {ordr: 1}\n")
    monkeypatch.setenv("PIPE_CONFIG", str(tmp_path / "other.yaml"))
    line = one_error_line(pipe("train", cwd=tmp_path))
    assert "other.yaml" in line
    assert "train.ordr" in line


def test_contradicting_flags_name_the_right_command(tmp_path):
    (tmp_path / "pipe.yaml").write_text("{}\n")
    line = one_error_line(pipe("train", "--method", "rankclip", "--order", "3", cwd=tmp_path))
    assert line.endswith("use: pipe train --method dinorankclip --order 3 --fusion none")


@pytest.mark.parametrize(
    ("raised", "code", "line"),
    [
        (PipeError("broken", where="a.tar", fix="mend it"), 1, "error: broken, a.tar; mend it"),
        (Stopped("training at step 3"), 75, "stopped: training at step 3; the same command goes on from here"),
        (KeyboardInterrupt(), 75, "stopped: run the same command again"),
        (Stopped("at 3", "go on with --resume"), 75, "stopped: at 3; go on with --resume\n"),
        (FileNotFoundError(2, "No such file", "x.tar"), 1, "error: No such file, x.tar"),
        (ZeroDivisionError("by zero"), 1, "error: unexpected ZeroDivisionError: by zero; please report it"),
        (PipeError("two\nlines"), 1, "error: two lines"),
    ],
)
def test_every_end_has_its_line_and_exit_code(monkeypatch, tmp_path, raised, code, line):
    import stages.init

    def fail(*_args, **_kwargs):
        raise raised

    monkeypatch.setattr(stages.init, "run", fail)
    result = CliRunner().invoke(cli.app, ["init", "--data", "x"])
    assert result.exit_code == code
    assert result.stderr.startswith(line)
    assert "Traceback" not in result.stderr


def test_debug_shows_the_traceback(monkeypatch):
    import stages.init

    def fail(*_args, **_kwargs):
        raise PipeError("broken")

    monkeypatch.setattr(stages.init, "run", fail)
    result = CliRunner().invoke(cli.app, ["init", "--data", "x", "--debug"])
    assert isinstance(result.exception, PipeError)


def test_sigterm_before_a_command_has_handlers_of_its_own_is_a_clean_stop():
    """While it imports, for instance: exit code 75, as for Ctrl-C."""
    before = signal.getsignal(signal.SIGTERM)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:

        @cli.friendly
        def command(debug: bool = False) -> None:
            signal.raise_signal(signal.SIGTERM)

        with pytest.raises(typer.Exit) as ended:
            command()
        assert ended.value.exit_code == 75
    finally:
        signal.signal(signal.SIGTERM, before)
