"""Fixtures that several modules use: a clean environment, a small configuration, the launcher."""

import fcntl
import json
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace

import pytest

import train_qwen3_ft as ft
from helpers import ROOT, SCRIPT
from helpers.config import STEPS, write_config, write_small_config
from helpers.launcher import FAKES, clean_environment, losses, run, train
from helpers.real import LIGHT_TEST, REAL_FIXTURES, real_fixture


@pytest.hookimpl(tryfirst=True)  # before pytest looks at -m
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests that use a fixture of ranks. The modules with most real tests come first: what
    is left at the end is short, so that xdist's workers end together.
    """
    for item in items:
        places = {
            (place, name)
            for place in (item.module.__name__, __name__)
            for name in item.fixturenames
        }
        if places & REAL_FIXTURES:
            item.add_marker("real")
    count = Counter(item.path for item in items if item.get_closest_marker("real"))
    items.sort(key=lambda item: -count[item.path])


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """While a test runs that is not marked `real`, nothing starts ranks, its fixtures included."""
    if not item.get_closest_marker("real"):
        os.environ[LIGHT_TEST] = item.nodeid
    try:
        return (yield)
    finally:
        os.environ.pop(LIGHT_TEST, None)


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository."""
    return ROOT


@pytest.fixture
def clean_env(tmp_path: Path) -> dict[str, str]:
    """An environment without what steers the launcher; its home is empty, its NVML the fake one."""
    (tmp_path / "home").mkdir(exist_ok=True)
    return {**clean_environment(), "HOME": str(tmp_path / "home"), "PYTHONPATH": str(FAKES)}


@pytest.fixture
def launcher(
    clean_env: dict[str, str], tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., SimpleNamespace]:
    """The script as a user starts it: launcher("config.yaml", "--dry-run", gpus=fake_gpus(4)).

    Returns returncode, stdout, stderr. `gpus=None` is a node without a driver.
    """

    def launch(
        *args: object,
        env: dict[str, str] | None = None,
        cwd: Path = tmp_path,
        gpus: list | None = None,
        script: Path = SCRIPT,
    ) -> SimpleNamespace:
        full = {**clean_env, **fake_nvml(gpus), **(env or {})}
        command = [sys.executable, str(script)]
        shown = tmp_path_factory.mktemp("shown")
        done = run(shown, *args, ranks=None, env=full, cwd=cwd, command=command, apart=True)
        return SimpleNamespace(
            returncode=done.returncode, stdout=done.console, stderr=done.errors
        )

    return launch


def fake_nvml(gpus: list | None) -> dict[str, str]:
    """The variable that tells the fake NVML which GPUs there are."""
    return {} if gpus is None else {"FAKE_GPUS": json.dumps(gpus)}


@pytest.fixture
def plan_of(here: Callable[..., SimpleNamespace]) -> Callable[..., dict]:
    """The JSON of --dry-run --json; problems in it do not matter."""

    def plan(*args: object, **options: object) -> dict:
        done = here(*args, "--dry-run", "--json", **options)
        assert done.stdout.startswith("{"), done.stderr
        return json.loads(done.stdout)

    return plan


cached_fields = cache(ft.known_fields)


@pytest.fixture
def here(
    clean_env: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> Callable[..., SimpleNamespace]:
    """The same as `launcher`, but main() in this process, which saves the start of a Python."""
    for key in set(os.environ) - set(clean_env):
        monkeypatch.delenv(key)
    monkeypatch.setenv("HOME", clean_env["HOME"])
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(FAKES))
    monkeypatch.delitem(sys.modules, "pynvml", raising=False)

    # The installed packages stay what they are while these tests run.
    monkeypatch.setattr("train_qwen3_ft.known_fields", cached_fields)

    def launch(
        *args: object, env: dict[str, str] | None = None, gpus: list | None = None
    ) -> SimpleNamespace:
        with monkeypatch.context() as patch:
            for key, value in {**fake_nvml(gpus), **(env or {})}.items():
                patch.setenv(key, value)
            capsys.readouterr()
            code = ft.main([str(arg) for arg in args])
        shown = capsys.readouterr()
        return SimpleNamespace(returncode=code, stdout=shown.out, stderr=shown.err)

    yield launch
    sys.modules.pop("pynvml", None)


@pytest.fixture(name="write_config")
def small_config(tmp_path: Path) -> Callable[..., Path]:
    """write_config(name, **changes): a small valid configuration for dry runs, under tmp_path."""
    return partial(write_small_config, tmp_path)


@real_fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """The base configuration's run of two ranks, uninterrupted: its `run_dir`.

    pytest-xdist's workers share one, which the first that needs it makes.
    """
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    folder /= "reference"
    folder.mkdir(exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not list(folder.glob("out/*/summary.json")):
            train(folder, write_config(folder))
    [run_dir] = folder.glob("out/*")
    assert sorted(losses(run_dir)) == list(range(1, STEPS + 1))
    return SimpleNamespace(run_dir=run_dir)


@pytest.fixture
def refused(
    here: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., SimpleNamespace]:
    """A real launch, not a dry run, that must end with exit code 2, no process started and no file
    written.
    """

    def start(*args: object, **options: object) -> None:
        pytest.fail(f"a process was started: {args}")

    def launch(*args: object, **options: object) -> SimpleNamespace:
        before = sorted(tmp_path.rglob("*"))
        with monkeypatch.context() as patch:
            patch.setattr(subprocess, "Popen", start)
            done = here(*args, **options)
        assert done.returncode == 2, done.stdout
        assert done.stdout == ""
        assert "Traceback" not in done.stderr
        assert sorted(tmp_path.rglob("*")) == before
        return done

    handlers = {
        number: signal.getsignal(number)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    }
    yield launch
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def accepted(here: Callable) -> Callable[..., str]:
    """A dry run that must find no problem; returns the plan."""

    def launch(*args: object, **options: object) -> str:
        done = here(*args, "--dry-run", **options)
        assert (done.returncode, done.stderr) == (0, "")
        return done.stdout

    return launch
