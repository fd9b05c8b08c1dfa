"""Nothing but hf:// asks for the network: an audit hook in every Python started sees who does.

The hook (support/offline/sitecustomize.py) sees sockets that Python opens, whatever the process makes of
being refused; `netns/test_no_wire.py` sees those of other languages too, and needs root.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from support import headless
from support.commands import COMMANDS, MODEL

HOOK = Path(__file__).parent / "support" / "offline"


@pytest.fixture
def trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The hook's file; from here on every Python that is started has the hook."""
    path = os.environ.get("PYTHONPATH", "")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(HOOK), *filter(None, [path])]))
    monkeypatch.setenv("LLAMACONV_SOCKETS", str(tmp_path / "sockets"))
    for name in ("HF_HUB_OFFLINE", "HF_ENDPOINT", "HTTPS_PROXY", "https_proxy"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path / "sockets"


def asked(trace: Path) -> tuple[int, list[str]]:
    """How many Pythons had the hook, and what they asked for."""
    lines = trace.read_text().splitlines()
    pythons = {line for line in lines if line.startswith("python ")}
    return len(pythons), [line for line in lines if line not in pythons]


def run(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "llamaconv", *words], cwd=folder, capture_output=True, text=True
    )


def test_no_command_on_folders_asks_for_the_network(trace: Path, tmp_path: Path) -> None:
    """All commands in one process, since it is the imports that take the time."""
    code = (
        "from llamaconv.cli import main\n"
        f"for command in {COMMANDS.splitlines()}:\n"
        "    assert main(command.split()) == 0, command\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    pythons, wanted = asked(trace)
    assert pythons >= 1
    assert not wanted


@pytest.mark.thorough
def test_no_command_in_a_process_of_its_own_asks_for_the_network(
    trace: Path, tmp_path: Path
) -> None:
    commands = COMMANDS.splitlines()
    for command in commands:
        done = run(tmp_path, *command.split())
        assert done.returncode == 0, f"{command}: {done.stderr}"
    pythons, wanted = asked(trace)
    assert pythons >= len(commands)
    assert not wanted


@pytest.mark.thorough
def test_no_notebook_on_folders_asks_for_the_network(trace: Path, tmp_path: Path) -> None:
    done = headless.run("4-convert.ipynb", tmp_path)
    assert done.returncode == 0, done.stderr
    pythons, wanted = asked(trace)
    assert pythons >= 2, "papermill, and the kernel that it started"
    assert not wanted


def test_a_repository_of_the_hub_is_seen_to_ask(trace: Path, tmp_path: Path) -> None:
    done = run(tmp_path, "inspect", MODEL)
    assert done.returncode == 2 and "huggingface.co" in done.stderr
    assert any("getaddrinfo" in line and "huggingface.co" in line for line in asked(trace)[1])


@pytest.mark.thorough
def test_a_notebook_on_the_hub_is_seen_to_ask(trace: Path, tmp_path: Path) -> None:
    done = headless.run("1-browse-index.ipynb", tmp_path, f"source={MODEL}")
    assert done.returncode != 0
    assert any("huggingface.co" in line for line in asked(trace)[1])


@pytest.mark.parametrize(
    ("code", "seen"),
    [
        ("s.connect(('192.0.2.1', 80))", True),
        ("s.connect(('127.0.0.1', 9))", False),
        ("socket.socket(type=socket.SOCK_DGRAM).sendto(b'', ('192.0.2.1', 53))", True),
        ("socket.getaddrinfo('example.org', 80)", True),
        ("socket.gethostbyname('localhost')", False),
        ("s.bind(('0.0.0.0', 0))", True),
        ("s.bind(('127.0.0.1', 0))", False),
        ("socket.socket(socket.AF_UNIX).connect('/nowhere')", False),
        ("subprocess.run([sys.executable, '-c', \"__import__('socket').create_connection(('192.0.2.1', 80))\"])", True),
    ],
)  # fmt: skip
def test_what_the_hook_sees(trace: Path, code: str, seen: bool) -> None:
    swallowed = f"import socket, subprocess, sys\ns = socket.socket()\ntry:\n    {code}\nexcept OSError:\n    pass"
    subprocess.run([sys.executable, "-c", swallowed], check=True)
    assert bool(asked(trace)[1]) == seen
