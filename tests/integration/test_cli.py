"""The command line: what people type wrong, and what commands must not load."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

DEMO_MODEL = Path(__file__).parents[2] / "models" / "demo"
NOBODY = "127.0.0.1:9"


def expert_mesh(*words: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "cli.main", *words], capture_output=True, text=True, input=stdin
    )


def complaint(done: subprocess.CompletedProcess[str]) -> str:
    """The one line that a mistake gets."""
    assert "Traceback" not in done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    return line.removeprefix("error: ")


def test_version_and_help() -> None:
    assert expert_mesh("--version").stdout.strip() == version("expert-mesh")
    shown = expert_mesh("--help").stdout
    tools = ("generate", "status", "plan", "bench", "scale", "roll", "drain", "rebalance")
    for command in ("up", "placement", "worker", "gateway", *tools):
        assert command in shown


def test_help_generate_and_status_never_load_torch() -> None:
    show = (
        "import sys; from cli.main import main;"
        "codes = [main(words.split()) for words in sys.argv[1:]];"
        "print(codes, 'torch' in sys.modules)"
    )
    words = ("--help", f"status --target {NOBODY}", f"generate --target {NOBODY} --prompt x")
    done = subprocess.run([sys.executable, "-c", show, *words], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "[0, 1, 1] False"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("worker", "--max-rows", "many"), "--max-rows: 'many' is not a whole number"),
        (("worker", "--max-rows", "70000"), "max_rows must be 1 to 65535"),
        (("gateway", "--dtype", "int3"), "--dtype: 'int3' is none of auto, float32"),
        (("gateway", "--tls-cert", "/none"), "tls_cert and tls_key belong together"),
        (("placement", "--rule", "loose"), "--rule: 'loose' is none of per-layer, strict"),
        (("placement", "--config", "/none.toml"), "No such file"),
        (("up", "--gateways", "0"), "gateways 1 or more"),
    ],
)
def test_a_bad_value_is_one_line_and_exit_2(words: tuple[str, ...], said: str) -> None:
    done = expert_mesh(*words)
    assert done.returncode == 2
    assert said in complaint(done)


@pytest.mark.parametrize("command", ["placement", "worker", "gateway", "up"])
def test_a_directory_that_is_no_checkpoint_is_one_line(command: str, tmp_path: Path) -> None:
    done = expert_mesh(command, "--model", str(tmp_path))
    assert done.returncode == 1
    assert str(tmp_path) in complaint(done)


def test_too_few_workers_is_one_line_with_both_remedies() -> None:
    done = expert_mesh("up", "--model", str(DEMO_MODEL), "--workers", "6")
    assert done.returncode == 1
    said = complaint(done)
    assert "6 workers cannot hold 16 experts" in said
    assert "--workers 16 or more, or --experts-per-worker 3" in said


@pytest.mark.parametrize("flag", ["--port", "--http-port"])
def test_a_port_in_use_is_one_line(flag: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        done = expert_mesh("placement", "--model", str(DEMO_MODEL), "--port", "0", flag, port)
    assert done.returncode == 2
    assert f"127.0.0.1:{port}: Address already in use" in complaint(done)


@pytest.mark.parametrize("command", ["status", "plan", "rebalance", "drain worker-00"])
def test_a_placement_that_is_not_there_is_one_line(command: str) -> None:
    done = expert_mesh(*command.split(), "--target", NOBODY)
    assert done.returncode == 1
    assert f"placement at {NOBODY} does not answer" in complaint(done)


@pytest.mark.parametrize("command", ["scale 5", "roll"])
def test_a_mesh_that_does_not_run_is_one_line(command: str) -> None:
    done = expert_mesh(*command.split(), "--mesh", "nobody")
    assert done.returncode == 1
    assert "no `expert-mesh up` nobody of this user runs" in complaint(done)


def test_a_gateway_that_is_not_there_is_one_line() -> None:
    done = expert_mesh("generate", "--target", NOBODY, "--prompt", "hello")
    assert done.returncode == 1
    assert NOBODY in complaint(done)


def test_doctor_says_what_there_is() -> None:
    done = expert_mesh("doctor", "--json")
    assert done.returncode == 0
    found = {finding["name"]: finding["found"] for finding in json.loads(done.stdout)["findings"]}
    assert "tcp" in found["UCX transports"]
