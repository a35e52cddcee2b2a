"""The server listens where it says, on loopback without a token, and stops when it is told."""

import re
import signal
import socket
import subprocess
import sys
import threading
import urllib.error
import urllib.request

import pytest

from whence.errors import MissingCurvatureError, MissingIndexError, SettingError, StorageError
from whence.explorer.serving import opened, serving

PATIENCE = 60


@pytest.fixture(scope="module")
def explored(tiny_index):
    return opened([tiny_index])


def status(address, **headers):
    try:
        with urllib.request.urlopen(urllib.request.Request(address, headers=headers), timeout=PATIENCE) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code


@pytest.fixture
def running(explored):
    """Start a server; it is stopped after the test."""
    started = []

    def start(**options):
        context = serving(explored, port=0, **options)
        server = context.__enter__()
        thread = threading.Thread(target=server.run)
        thread.start()
        started.append((context, server, thread))
        return server

    yield start
    for context, server, thread in started:
        server.stop()
        thread.join(PATIENCE)
        assert not thread.is_alive()
        context.__exit__(None, None, None)


def test_loopback_needs_no_token(running):
    server = running()
    assert re.fullmatch(r"http://127\.0\.0\.1:\d+/", server.address)
    assert status(server.address) == status(f"{server.address}api/session") == 200
    assert status(server.address, Host="evil.example") == 421


def test_any_other_address_has_a_token(running):
    server = running(host="0.0.0.0")
    address, token = re.fullmatch(r"(http://)0\.0\.0\.0(:\d+/)\?token=(\S{16,})", server.address).group(2, 3)
    page = f"http://127.0.0.1{address}"
    assert status(page) == 401
    assert status(page, Authorization=f"Bearer {token}") == 200


def test_a_given_token_is_asked_for_on_loopback_too(running):
    server = running(token="mine")
    assert server.address.endswith("/?token=mine")
    assert status(server.address.partition("?")[0]) == 401


@pytest.mark.parametrize("token", ["", "a b", "a&b", "a+b", "é"])
def test_a_token_stands_in_an_address(explored, token):
    with pytest.raises(SettingError, match="--token: letters, digits"), serving(explored, port=0, token=token):
        pass


def test_a_port_that_is_taken_says_so(explored):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(StorageError, match=f"127.0.0.1:{port} .*--port"), serving(explored, port=port):
            pass


def test_an_address_of_another_machine_says_so(explored):
    with (
        pytest.raises(SettingError, match=r"--host 192\.0\.2\.1: an address of this machine"),
        serving(explored, host="192.0.2.1", port=0),
    ):
        pass
    with pytest.raises(SettingError, match="--host no such host"), serving(explored, host="no such host", port=0):
        pass


def test_what_is_not_there_says_so(tiny_index, tmp_path):
    with pytest.raises(MissingIndexError, match="There is no index"):
        opened([tmp_path / "none"])
    with pytest.raises(MissingCurvatureError, match="no curvature here"):
        opened([tiny_index], curvature=str(tmp_path / "none"))


def test_the_command_says_where_and_stops(tiny_index):
    command = [sys.executable, "-m", "whence", "explore", str(tiny_index), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stderr is not None
        line = process.stdout.readline()
        address = re.match(
            r"The page is at (http://127\.0\.0\.1:\d+/) until Ctrl-C stops it\. Next: whence trace ", line
        )
        assert address, line
        assert status(f"{address[1]}api/session") == 200
        process.send_signal(signal.SIGINT)
        assert process.wait(PATIENCE) == 0
        assert "error" not in process.stderr.read()
