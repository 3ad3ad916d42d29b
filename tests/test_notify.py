"""The message at the end of a run: JSON to a webhook; a dead server costs seconds only."""

import json
import re
import socket
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

import train_qwen3_ft as ft
from helpers import SCRIPT
from helpers.config import write_config
from helpers.launcher import Run, committed, free_port, run, says
from helpers.real import real_fixture

SECRET = "T0KEN-OF-A-HOOK"
SUMMARY = {
    "run": "/out/run",
    "state": "finished",
    "steps": 2,
    "model": "/out/run",
    "resume": None,
    "cause": "",
}


class Hook:
    """A webhook on 127.0.0.1 that keeps what it is sent, as (path, JSON); a silent one never answers."""

    def __init__(self, silent: bool = False):
        self.posts, self.released = [], threading.Event()
        hook = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:  # noqa: N802
                body = self.rfile.read(int(self.headers["Content-Length"]))
                assert self.headers["Content-Type"] == "application/json"
                hook.posts.append((self.path, json.loads(body)))
                if silent:
                    hook.released.wait()
                self.send_response(200)
                self.end_headers()

            def log_message(self, *args: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads, self.server.block_on_close = True, False
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def __enter__(self) -> "Hook":
        return self

    def __exit__(self, *exception: object) -> None:
        self.released.set()
        self.server.shutdown()
        self.server.server_close()

    def url(self, name: str = "notify") -> str:
        """An address of the hook, with a secret in it."""
        return f"http://127.0.0.1:{self.server.server_address[1]}/{name}/{SECRET}"

    def message(self, name: str = "notify") -> dict:
        """The one message that an address got."""
        [found] = [content for path, content in self.posts if path == f"/{name}/{SECRET}"]
        return found


def dead_url() -> str:
    """An address where nobody listens."""
    return f"http://127.0.0.1:{free_port()}/{SECRET}"


@contextmanager
def babbler() -> Iterator[str]:
    """The address of a server that does not speak HTTP."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            connection = server.accept()[0]
            connection.recv(4096)
            connection.sendall(b"SSH-2.0-OpenSSH_9.2\r\n")
            connection.close()

        threading.Thread(target=answer, daemon=True).start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}/{SECRET}"


def files_with(folder: Path, *secrets: str) -> list[str]:
    """The files of a run that hold a secret."""
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return [
        str(path)
        for path in paths
        if any(text.encode() in path.read_bytes() for text in secrets)
    ]


# --- real runs: one process, a few steps


def small_run(folder: Path, **changes: object) -> Path:
    """Four steps on one process, saved at each step."""
    return write_config(folder, deepspeed=None, max_samples=4, save_steps=1, **changes)


@pytest.fixture(scope="module")
def hook() -> Iterator[Hook]:
    """A webhook that answers."""
    with Hook() as server:
        yield server


@real_fixture
def finished(tmp_path_factory: pytest.TempPathFactory, hook: Hook) -> Run:
    """A run that ends well and tells a webhook."""
    folder = tmp_path_factory.mktemp("finished")
    return run(folder, small_run(folder, notify=hook.url()), ranks=1)


@real_fixture
def failed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Hook]:
    """A run that fails in its third step and tells a webhook that has not answered by its end."""
    folder = tmp_path_factory.mktemp("failed")
    with Hook(silent=True) as silent:
        config = small_run(folder, notify=silent.url(), max_restarts=0)
        with Run(folder, config, ranks=1, faults=[{"point": "raise", "step": 3}]) as alive:
            alive.wait()
            return alive, silent


@real_fixture
def stopped(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Hook]:
    """A run that is stopped after a step."""
    folder = tmp_path_factory.mktemp("stopped")
    with Hook() as server:
        config = small_run(folder, notify=server.url())
        with Run(folder, config, ranks=1, faults=[{"point": "slow"}]) as alive:
            alive.reach(1)
            alive.process.terminate()
            alive.wait()
            return alive, server


def test_a_finished_run_posts_its_summary(finished: Run, hook: Hook):
    assert finished.returncode == 0, finished.console
    message = hook.message()
    summary = json.loads((finished.run_dir / "summary.json").read_text(encoding="utf-8"))
    assert message == ft.without(summary, "wrong_answers")  # data stays here
    assert (message["state"], message["steps"]) == ("finished", 4)
    assert (message["model"], message["resume"]) == (str(finished.run_dir), None)


def test_a_failed_run_posts_its_cause_and_how_to_resume(failed: tuple[Run, Hook]):
    done, silent = failed
    message = silent.message()
    assert message["state"] == "failed"
    assert "planted fault: the third sample is bad" in message["cause"]
    assert message["resume"] == f"NPROC_PER_NODE=1 python {SCRIPT} --resume {done.run_dir}"


def test_a_stopped_run_posts_how_to_resume(stopped: tuple[Run, Hook]):
    done, server = stopped
    message = server.message()
    checkpoint = f"{done.run_dir}/checkpoint-{committed(done.run_dir)[-1]}"  # is a model too
    assert (message["state"], message["cause"], message["model"]) == ("stopped", "", checkpoint)
    assert message["resume"] == f"NPROC_PER_NODE=1 python {SCRIPT} --resume {done.run_dir}"


def test_a_webhook_that_never_answers_changes_no_exit_code(failed: tuple[Run, Hook]):
    done, _ = failed
    assert done.returncode == 1, done.console
    assert done.left_after() == []


def test_the_address_of_a_webhook_is_in_no_file_of_a_run(finished, failed, stopped):
    for done in (finished, failed[0], stopped[0]):
        assert files_with(done.run_dir.parent, SECRET) == []
        assert SECRET not in done.console


# --- what can be wrong with an address


def notify(capfd: pytest.CaptureFixture, summary: dict = SUMMARY, **secrets: str) -> str:
    """What sending the notifications shows."""
    ft.notify(ft.Config("c.yaml", ft.Values(), secrets=secrets), summary)
    shown = capfd.readouterr()
    return shown.out + shown.err


def test_without_a_webhook_nothing_is_sent(capfd: pytest.CaptureFixture):
    assert notify(capfd) == ""


def test_a_webhook_that_refuses_costs_a_line(capfd: pytest.CaptureFixture):
    assert "notify: the message was not delivered" in notify(capfd, notify=dead_url())


def test_a_server_that_does_not_speak_http_costs_a_line(capfd: pytest.CaptureFixture):
    with babbler() as url:
        shown = notify(capfd, notify=url)
    assert re.fullmatch("notify: the message was not delivered: [^\n]*\n", shown), shown


@pytest.mark.parametrize("url", ["hooks.example/KEY", "ftp//KEY", "http://127.0.0.1:1/a KEY"])
def test_an_address_that_is_none_costs_a_line_that_does_not_repeat_it(capfd, url: str):
    shown = notify(capfd, notify=url)
    assert re.fullmatch("notify: the message was not delivered: [^\n]*\n", shown), shown
    assert "KEY" not in shown


def test_lark_is_refused_with_what_tells_it_instead(here, write_config):
    done = here(write_config(swanlab_lark_webhook_url="https://hooks.example/KEY"), "--dry-run")
    assert done.returncode == 2
    says(done.stderr, r"swanlab_lark_webhook_url: .*use notify: URL")


def test_an_address_that_is_none_is_refused_before_the_start(here, write_config):
    done = here(write_config(notify="hooks.example/KEY"), "--dry-run")
    assert done.returncode == 2
    says(done.stderr, "config.yaml:[0-9]+: notify: expected a URL")
    assert "KEY" not in done.stdout + done.stderr


def test_a_server_gets_ten_seconds(capfd: pytest.CaptureFixture, monkeypatch):
    """To connect and for each answer (urlopen), and in all (join)."""
    waited = []

    def answer(*args: object, timeout: float) -> None:
        waited.append(timeout)
        raise TimeoutError

    def join(thread: threading.Thread, timeout: float | None = None) -> None:
        waited.append(timeout)
        whole_join(thread)

    whole_join = threading.Thread.join
    monkeypatch.setattr(urllib.request, "urlopen", answer)
    monkeypatch.setattr(threading.Thread, "join", join)
    assert "not delivered: TimeoutError" in notify(capfd, notify="https://hooks.example/KEY")
    assert waited == [10, 10]
