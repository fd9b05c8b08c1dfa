"""Nothing but hf:// puts a packet on the wire, whatever language it is written in.

Each run has a network namespace of its own with one interface beside the loopback, which leads
nowhere and is where names and all other addresses are asked for; what Linux counts as sent there
is what the run wanted of the network. Needs root, so it is run by name:

    pytest tests/netns
"""

import os
import subprocess
import sys
from pathlib import Path

from support import headless
from support.commands import COMMANDS, MODEL

# Two ends of a cable in one namespace. Without IPv6, whose interfaces send when they come up.
APART = """\
set -e
echo 1 > /proc/sys/net/ipv6/conf/default/disable_ipv6
ip link add wire type veth peer name end
ip address add 203.0.113.1/24 dev wire
for device in lo wire end; do ip link set "$device" up; done
ip route add default via 203.0.113.2
mount --bind "$1" /etc/resolv.conf
shift
"$@" || status=$?
sed -n 's/^ *wire: *//p' /proc/net/dev > "$SENT"
exit "${status:-0}"
"""


def packets(folder: Path, *words: str) -> tuple[subprocess.CompletedProcess[str], int]:
    """A command in a namespace of its own, and how many packets it sent."""
    resolver = folder / "resolv.conf"
    resolver.write_text("nameserver 203.0.113.2\noptions timeout:1 attempts:1\n")
    online = ("HF_HUB_OFFLINE", "HF_ENDPOINT", "HTTPS_PROXY", "https_proxy")
    environment = {name: value for name, value in os.environ.items() if name not in online}
    done = subprocess.run(
        ["unshare", "--net", "--mount", "sh", "-c", APART, "sh", str(resolver), *words],
        cwd=folder,
        env=environment | {"SENT": str(folder / "sent")},
        capture_output=True,
        text=True,
        timeout=120,
    )
    # Received: bytes, packets and six more; then sent: bytes, packets.
    return done, int((folder / "sent").read_text().split()[9])


def llamaconv(*words: str) -> list[str]:
    return [sys.executable, "-m", "llamaconv", *words]


def papermill(notebook: str, *words: str) -> list[str]:
    path = str(headless.NOTEBOOKS / notebook)
    return [sys.executable, "-m", "papermill", path, "run.ipynb", "--no-progress-bar", *words]


def test_no_command_on_folders_sends_a_packet(tmp_path: Path) -> None:
    for command in COMMANDS.splitlines():
        done, sent = packets(tmp_path, *llamaconv(*command.split()))
        assert (done.returncode, sent) == (0, 0), f"{command}: {done.stderr}"


def test_no_notebook_on_folders_sends_a_packet(tmp_path: Path) -> None:
    done, sent = packets(tmp_path, *papermill("4-convert.ipynb"))
    assert (done.returncode, sent) == (0, 0), done.stderr


def test_a_repository_of_the_hub_is_counted(tmp_path: Path) -> None:
    done, sent = packets(tmp_path, *llamaconv("inspect", MODEL))
    assert done.returncode == 2 and "huggingface.co" in done.stderr
    assert sent > 0


def test_a_notebook_on_the_hub_is_counted(tmp_path: Path) -> None:
    done, sent = packets(tmp_path, *papermill("1-browse-index.ipynb", "-p", "source", MODEL))
    assert done.returncode != 0 and sent > 0
