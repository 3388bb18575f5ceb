"""What surrounds every command: exit codes, JSON on stdout and nothing else there, one-line errors, no secrets."""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import unmergeable
from unmergeable import errors
from unmergeable.cli import main
from unmergeable.cli.app import COMMANDS
from unmergeable.cli.command import Switches
from unmergeable.cli.failure import failure_of

from .conftest import RecordingOps, Run

Runner = Callable[..., Run]

VERIFY = ("verify", "a", "b")
PROTECT = ("protect", "expert", "--base", "base", "--out", "out")
SOURCE = Path(unmergeable.__file__).parents[1]


def python(code: str, **options: Any) -> subprocess.Popen[str]:
    """Run a script that can import the package, as another process."""
    environment = {**os.environ, "PYTHONPATH": str(SOURCE)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-c", code], env=environment, **{**pipes, **options})


# --- help ---------------------------------------------------------------------------------------------------------


def test_help_lists_every_command(run: Runner) -> None:
    shown = run("--help")

    assert shown.exit_code == 0
    assert [name for name in COMMANDS if f"\n  {name} " not in shown.stdout] == []
    assert "...\n" not in shown.stdout.partition("Commands:")[2], "a summary is too long for its line"


def test_without_arguments_the_help_is_shown(run: Runner) -> None:
    assert run() == run("--help")


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_explains_itself(command: str, run: Runner) -> None:
    text = run(command, "--help").stdout

    assert f"Example:\n    unmergeable {command}" in text
    assert {"--json", "--quiet", "--debug"} <= set(text.split())


@pytest.mark.parametrize("command", ["protect", "recover", "methods"])
def test_help_says_what_a_protection_does_not_stop(command: str, run: Runner) -> None:
    text = " ".join(run(command, "--help").stdout.split())

    assert re.search("stops? somebody who holds the base", text)


def test_help_needs_no_heavy_import_and_no_second() -> None:
    heavy = ("torch", "transformers", "pydantic", "numpy", "yaml", "cryptography")
    code = (
        "import sys\nfrom unmergeable.cli import main\nmain(sys.argv[1:] or ['--help'])\n"
        f"print('loaded:', [name for name in {heavy} if name in sys.modules])"
    )
    seconds = []
    for _ in range(3):  # a busy machine may delay one of them
        started = time.perf_counter()
        output, _ = python(code).communicate()
        seconds.append(time.perf_counter() - started)

    assert "loaded: []" in output
    assert min(seconds) < 1
    control, _ = python(code.replace("main(", "import numpy; main(")).communicate()
    assert "loaded: ['numpy']" in control


@pytest.mark.parametrize(("module", "code"), [("fcntl", 1), ("shelve", 3)], ids=["Windows", "the control"])
def test_a_system_without_locks_on_files_is_named_in_one_line(module: str, code: int, tmp_path: Path) -> None:
    script = (
        f"import sys; sys.modules[{module!r}] = None; from unmergeable.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    found = subprocess.run(
        [sys.executable, "-c", script, "inspect", str(tmp_path / "absent")],
        env={**os.environ, "PYTHONPATH": str(SOURCE)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == code
    assert found.stderr.count("\n") == 1
    assert ("needs Linux or macOS" in found.stderr) == (module == "fcntl")


def test_a_message_of_unreasonable_length_is_cut() -> None:
    message = failure_of(errors.BadInput("x" * 10_000)).message
    assert message.endswith("x …")
    assert len(message) < 5000


def test_runs_as_a_module() -> None:
    found = subprocess.run(
        [sys.executable, "-m", "unmergeable", "frobnicate"],
        env={**os.environ, "PYTHONPATH": str(SOURCE)},
        capture_output=True,
        text=True,
        check=False,
    )

    assert (found.returncode, found.stdout) == (2, "")
    assert "No such command 'frobnicate'" in found.stderr


# --- exit codes ---------------------------------------------------------------------------------------------------

EXIT_CODES = {
    errors.UnmergeableError: 1,
    errors.DiskError: 1,
    errors.UsageError: 2,
    errors.BadInput: 3,
    errors.CheckpointError: 3,
    errors.UnsupportedArchitecture: 3,
    errors.Mismatch: 3,
    errors.NotEquivalent: 4,
    errors.KeyFileError: 5,
    MemoryError: 1,
    RuntimeError: 1,
}


def test_every_error_has_a_documented_exit_code() -> None:
    def tree(kind: type[BaseException]) -> set[type[BaseException]]:
        return {kind}.union(*(tree(child) for child in kind.__subclasses__()))

    assert {kind for kind in tree(errors.UnmergeableError) if kind.__module__ == errors.__name__} <= set(EXIT_CODES)


@pytest.mark.parametrize(("kind", "code"), EXIT_CODES.items(), ids=lambda value: getattr(value, "__name__", ""))
def test_error_is_one_line_and_its_exit_code(kind: type[Exception], code: int, ops: RecordingOps, run: Runner) -> None:
    ops.answer = kind("what\nwhere: what to do.")

    text = run(*VERIFY)
    document = run(*VERIFY, "--json")

    assert (text.exit_code, text.stdout) == (code, "")
    assert text.stderr.startswith("error: ")
    assert text.stderr.count("\n") == 1
    assert (document.exit_code, document.stderr) == (code, "")
    error = document.document["error"]
    assert error["exit_code"] == code
    assert f"error: {error['message']}\n" == text.stderr
    assert set(error) == {"kind", "message", "exit_code"}


def test_library_errors_keep_their_message_and_kind(ops: RecordingOps, run: Runner) -> None:
    ops.answer = errors.Mismatch("tensor x: 3 here, 4 there; give the right base.")

    error = run(*VERIFY, "--json").document["error"]

    assert error["kind"] == "Mismatch"
    assert error["message"] == "tensor x: 3 here, 4 there; give the right base."


def test_operating_system_errors_name_the_file(ops: RecordingOps, run: Runner) -> None:
    ops.answer = OSError(errno.EACCES, "Permission denied", "/some/file")

    shown = run(*VERIFY)

    assert (shown.exit_code, shown.stderr) == (1, "error: /some/file: Permission denied.\n")


def test_missing_package_names_the_remedy(ops: RecordingOps, run: Runner) -> None:
    ops.answer = ModuleNotFoundError("No module named 'diffusers'", name="diffusers")

    shown = run(*VERIFY)

    assert shown.exit_code == 1
    assert "diffusers is not installed" in shown.stderr
    assert "pip install 'unmergeable[demo,diffusion]'" in shown.stderr


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("protect", "x"), "Missing option '--base'"),
        (("verify", "a"), "OTHER"),
        (("methods", "--frobnicate"), "--frobnicate"),
        (("frobnicate",), "frobnicate"),
        (("verify", "a", "b", "--threads", "0"), "--threads"),
        (("verify", "a", "b", "--threads", "many"), "--threads"),
        (("merge", "--method", "ties", "--out", "o"), "--expert"),
    ],
)
def test_wrong_arguments_are_one_line_too(arguments: tuple[str, ...], expected: str, run: Runner) -> None:
    text = run(*arguments)
    document = run("--json", *arguments)

    assert (text.exit_code, text.stdout, text.stderr.count("\n")) == (2, "", 1)
    assert expected in text.stderr
    assert "--help" in text.stderr
    assert (document.exit_code, document.stderr) == (2, "")
    assert document.document["error"]["kind"] == "UsageError"


def test_not_equal_is_an_answer_with_its_own_exit_code(
    ops: RecordingOps, run: Runner, verdict: Callable[..., SimpleNamespace]
) -> None:
    ops.answer = verdict(is_equal=False)
    assert run(*VERIFY).exit_code == 4
    assert run(*VERIFY, "--json").document == {"equal": False}

    ops.answer = verdict()
    assert run(*VERIFY).exit_code == 0


# --- stdout belongs to the result ---------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [(*VERIFY, "--json"), ("--json", *VERIFY), ("verify", "--json", "a", "b")])
def test_json_is_alone_on_stdout(
    arguments: tuple[str, ...], ops: RecordingOps, run: Runner, verdict: Callable[..., SimpleNamespace]
) -> None:
    def noisy(progress: Callable[..., None], **_: object) -> SimpleNamespace:
        print("a library that talks")
        logging.getLogger("unmergeable.somewhere").warning("mind this")
        progress("writing", 1, 2, "bytes")
        return verdict()

    ops.answer = noisy

    shown = run(*arguments)

    assert shown.document == {"equal": True}
    assert "a library that talks" in shown.stderr
    assert "warning: mind this" in shown.stderr


def test_without_json_stdout_is_text(ops: RecordingOps, run: Runner, verdict: Callable[..., SimpleNamespace]) -> None:
    ops.answer = verdict()

    assert run(*VERIFY).stdout.startswith("Equal up to rounding: a and b")


def test_json_has_no_nan(ops: RecordingOps, run: Runner, verdict: Callable[..., SimpleNamespace]) -> None:
    ops.answer = verdict(gaps=(float("nan"), {"bound": float("inf")}, 0.5))

    shown = run(*VERIFY, "--json")

    assert shown.document["gaps"] == [None, {"bound": None}, 0.5]
    assert "NaN" not in shown.stdout


def test_unprintable_names_do_not_spoil_a_success(
    ops: RecordingOps, run: Runner, verdict: Callable[..., SimpleNamespace]
) -> None:
    ops.answer = verdict()

    assert run("verify", "a\udcff", "b").exit_code == 0


def test_debug_logs_more_and_only_then(ops: RecordingOps, run: Runner, verdict: Callable[..., SimpleNamespace]) -> None:
    def talkative(**_: object) -> SimpleNamespace:
        logging.getLogger("unmergeable.somewhere").debug("details")
        return verdict()

    ops.answer = talkative

    assert "debug: details" not in run(*VERIFY).stderr
    assert "debug: details" in run(*VERIFY, "--debug").stderr


# --- tracebacks and secrets ---------------------------------------------------------------------------------------


def test_traceback_only_on_request_and_never_with_locals(ops: RecordingOps, run: Runner) -> None:
    def fail(**_: object) -> None:
        passphrase = "".join(["correct", "horse"])
        raise RuntimeError(f"a mistake of ours in {len(passphrase)} places")

    ops.answer = fail

    plain, debug = run(*VERIFY), run(*VERIFY, "--debug")

    assert "Traceback" not in plain.stderr
    assert plain.stderr.endswith("run again with --debug for the traceback.\n")
    assert "Traceback" in debug.stderr
    assert "a mistake of ours in 12 places" in debug.stderr
    assert "correcthorse" not in plain.stderr + debug.stderr


def test_traceback_does_not_disturb_json(ops: RecordingOps, run: Runner) -> None:
    ops.answer = RuntimeError("a mistake of ours")

    shown = run(*VERIFY, "--debug", "--json")

    assert shown.document["error"]["kind"] == "InternalError"
    assert "Traceback" in shown.stderr


# --- interruption -------------------------------------------------------------------------------------------------


def test_interrupted_work_says_how_to_go_on(ops: RecordingOps, run: Runner) -> None:
    ops.answer = KeyboardInterrupt()

    shown = run(*PROTECT)

    assert (shown.exit_code, shown.stdout) == (130, "")
    assert shown.stderr == "error: interrupted; run the same command again to resume.\n"
    assert run(*PROTECT, "--json").document["error"]["kind"] == "Interrupted"


@pytest.mark.parametrize("arguments", [VERIFY, (*PROTECT, "--dry-run")])
def test_nothing_to_go_on_with_where_nothing_was_written(
    arguments: tuple[str, ...], ops: RecordingOps, run: Runner
) -> None:
    ops.answer = KeyboardInterrupt()

    assert run(*arguments).stderr == "error: interrupted.\n"


def test_interrupted_before_the_work_begins(run: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(**_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("unmergeable.cli.protect.read_passphrase", interrupt)

    shown = run(*PROTECT)

    assert (shown.exit_code, shown.stderr) == (130, "error: interrupted.\n")


def test_control_c_ends_a_process_with_130() -> None:
    code = """
import signal, sys, time, types, unmergeable
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have started us with it ignored
def verify(*_, **__):
    print("ready", file=sys.stderr, flush=True)
    time.sleep(60)
unmergeable.ops = types.SimpleNamespace(verify=verify)
from unmergeable.cli import main
sys.exit(main(["verify", "a", "b", "--json"]))
"""
    process = python(code)
    assert process.stderr is not None
    assert process.stderr.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=30)

    assert process.returncode == 130
    assert json.loads(stdout)["error"]["exit_code"] == 130
    assert stderr == ""


def test_a_reader_that_has_enough_is_no_error() -> None:
    read_end, write_end = os.pipe()
    os.close(read_end)
    code = """
import sys, types, unmergeable
unmergeable.ops = types.SimpleNamespace(schema=lambda: {"short": "flushed by the command, not by the interpreter"})
from unmergeable.cli import main
sys.exit(main(["schema"]))
"""
    process = python(code, stdout=write_end)
    os.close(write_end)
    _, stderr = process.communicate()

    assert (process.returncode, stderr) == (0, "")


# --- switches -----------------------------------------------------------------------------------------------------


def test_switches_hold_wherever_they_stand() -> None:
    assert Switches.read(["--quiet", "verify", "a", "--json"]) == Switches(json=True, quiet=True)
    assert Switches.read(["verify", "--", "--json"]) == Switches(), "after -- it is the name of a file"
    assert Switches.read(["verify", "--debugging"]) == Switches()


def test_logging_is_left_as_it_was(run: Runner) -> None:
    logger = logging.getLogger("unmergeable")
    before = (list(logger.handlers), logger.level)

    run("--debug", "frobnicate")

    assert (list(logger.handlers), logger.level) == before


def test_version(run: Runner) -> None:
    shown = run("--version")

    assert shown.exit_code == 0
    assert shown.stdout.strip()


def test_main_returns_the_exit_code() -> None:
    assert main(["--help"]) == 0
