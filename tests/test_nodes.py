"""Several machines: two launchers of one process each, on loopback and in network namespaces of their own."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import uuid
from pathlib import Path

import pytest

from helpers import SCRIPT
from helpers.config import write_config
from helpers.launcher import Run, committed, free_port, losses, run, weights

SETTINGS = {"max_samples": 40, "save_steps": 4, "save_total_limit": None}  # 20 steps on two ranks


def machines(nodes: int, address: str = "127.0.0.1") -> list[dict[str, str]]:
    """The environment of each machine."""
    port = str(free_port())
    return [{"NNODES": str(nodes), "NODE_RANK": str(rank), "MASTER_ADDR": address, "MASTER_PORT": port}
            for rank in range(nodes)]


@pytest.fixture(scope="module")
def one_machine(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The same run on one machine with two ranks."""
    folder = tmp_path_factory.mktemp("one")
    return run(folder, write_config(folder, **SETTINGS))


@pytest.fixture(scope="module")
def two_machines(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Run]:
    """A run on two machines, the second started first."""
    folder = tmp_path_factory.mktemp("two")
    config, (first, second) = write_config(folder, **SETTINGS, report_to="swanlab"), machines(2)
    with Run(folder, config, "run_name=two", ranks=1, env=second) as late:
        early = run(folder, config, "run_name=two", ranks=1, env=first)
        late.wait()
    return early, late


def test_two_machines_train_one_run_to_the_weights_of_one_machine(two_machines: tuple[Run, Run], one_machine: Run):
    first, second = two_machines
    assert (first.process.returncode, second.process.returncode) == (0, 0), first.console + second.console
    assert "x 2 processes x 1 accumulation = 2 samples a step" in first.console
    assert losses(first.run_dir) == losses(one_machine.run_dir)
    assert weights(first.run_dir) == weights(one_machine.run_dir)


def test_only_the_first_machines_console_speaks(two_machines: tuple[Run, Run]):
    first, second = two_machines
    assert "step 20/20" in first.console
    assert [line for line in second.console.splitlines() if not line.startswith("waiting for")] == []


def test_two_machines_make_one_run_directory_and_one_swanlab_record(two_machines: tuple[Run, Run]):
    output = two_machines[0].run_dir.parent
    assert sorted(path.name for path in output.iterdir()) == ["swanlog", "two"]
    assert len(list((output / "swanlog").glob("run-*"))) == 1


def test_a_stop_on_the_second_machine_stops_both_after_a_checkpoint(tmp_path: Path):
    config, (first, second) = write_config(tmp_path, **SETTINGS, num_train_epochs=20), machines(2)
    with (Run(tmp_path, config, "run_name=stop", ranks=1, env=first) as leader,
          Run(tmp_path, config, "run_name=stop", ranks=1, env=second) as other):
        leader.reach(3)
        other.process.send_signal(signal.SIGTERM)
        assert (leader.wait(), other.wait()) == (143, 143), leader.console
        assert len(committed(leader.run_dir)) >= 1
        assert "stopped at step" in leader.console


def test_a_machine_that_dies_and_comes_back_resumes_the_run(tmp_path: Path, one_machine: Run):
    config, (first, second) = write_config(tmp_path, **SETTINGS), machines(2)
    with Run(tmp_path, config, "run_name=back", ranks=1, env=first) as leader:
        with Run(tmp_path, config, "run_name=back", ranks=1, env=second) as lost:
            leader.reach(6)
            for pid in lost.pids():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        leader.see("restart 1 of at most 3")
        back = run(tmp_path, config, "run_name=back", ranks=1, env=second)
        assert (leader.wait(), back.process.returncode) == (0, 0), leader.console + back.console
    assert weights(leader.run_dir) == weights(one_machine.run_dir)


def test_a_machine_that_waits_for_another_says_so_and_obeys_a_stop_at_once(tmp_path: Path):
    config = write_config(tmp_path, **SETTINGS)
    with Run(tmp_path, config, "run_name=alone", ranks=1, env=machines(2)[0]) as leader:
        leader.see(r"waiting for the other machines at 127\.0\.0\.1:\d+, for up to 15 minutes")
        leader.process.send_signal(signal.SIGTERM)
        assert leader.wait(30) == 143
        assert leader.left_after() == []
    assert "state       stopped at step 0 of 20" in leader.console
    assert "failed" not in leader.console


def test_a_run_that_was_stopped_while_it_waited_for_a_lost_machine_resumes(tmp_path: Path, one_machine: Run):
    config, (first, second) = write_config(tmp_path, **SETTINGS), machines(2)
    with Run(tmp_path, config, "run_name=lost", ranks=1, env=first) as leader:
        with Run(tmp_path, config, "run_name=lost", ranks=1, env=second):
            leader.reach(6)
        leader.see("restart 1 of at most 3")
        leader.process.send_signal(signal.SIGINT)
        assert leader.wait(30) == 130, leader.console
        variables = f"NNODES=2 NODE_RANK=0 MASTER_ADDR=127.0.0.1 MASTER_PORT={first['MASTER_PORT']}"
        assert f"resume      {variables} python {SCRIPT} --resume {leader.run_dir}" in leader.console
    with Run(tmp_path, config, "run_name=lost", ranks=1, env=second) as back:  # the old STOP file is still there
        resumed = run(tmp_path, "--resume", leader.run_dir, ranks=1, env=first)
        assert (resumed.process.returncode, back.wait()) == (0, 0), resumed.console + back.console
    assert weights(leader.run_dir) == weights(one_machine.run_dir)


def test_a_machine_that_falls_silent_is_given_up_and_the_run_resumes_when_it_is_back(tmp_path: Path,
                                                                                     one_machine: Run):
    text = SCRIPT.read_text(encoding="utf-8")
    assert "BEAT, MISSED = 10, 18" in text
    impatient = tmp_path / SCRIPT.name  # the same script that waits for 3 seconds and not for 3 minutes
    impatient.write_text(text.replace("BEAT, MISSED = 10, 18", "BEAT, MISSED = 1, 3"), encoding="utf-8")
    config, (first, second) = write_config(tmp_path, **SETTINGS), machines(2)
    command = [sys.executable, str(impatient)]
    with Run(tmp_path, config, "run_name=mute", ranks=1, env=first, command=command) as leader:
        with Run(tmp_path, config, "run_name=mute", ranks=1, env=second, command=command) as lost:
            leader.reach(6)
            for pid in lost.pids():
                os.kill(pid, signal.SIGSTOP)  # as with a machine without power, no connection is closed
            leader.see("machine 1 has not been heard of for 3 s")
            leader.see("restart 1 of at most 3")
        back = run(tmp_path, config, "run_name=mute", ranks=1, env=second, command=command)
        assert (leader.wait(), back.process.returncode) == (0, 0), leader.console + back.console
    assert weights(leader.run_dir) == weights(one_machine.run_dir)


def test_machines_with_different_numbers_of_processes_are_refused(tmp_path: Path):
    config, (first, second) = write_config(tmp_path, **SETTINGS, deepspeed=None), machines(2)
    with Run(tmp_path, config, "run_name=odd", ranks=2, env=second):
        leader = run(tmp_path, config, "run_name=odd", ranks=1, env=first)
    assert leader.process.returncode == 1
    assert "the machines start different numbers of processes" in leader.console


@pytest.fixture
def namespaces() -> list[str]:
    """Two network namespaces, joined by a pair of virtual cables: 10.77.0.1 and 10.77.0.2."""
    if os.geteuid() or not shutil.which("ip"):
        pytest.skip("making network namespaces takes root and the program ip")
    names = [f"launcher-{uuid.uuid4().hex[:6]}" for _ in range(2)]
    cables = [f"v{name[-6:]}" for name in names]
    commands = [["netns", "add", name] for name in names]
    commands += [["link", "add", cables[0], "type", "veth", "peer", "name", cables[1]]]
    for number, (name, cable) in enumerate(zip(names, cables, strict=True), 1):
        inside = ["-n", name]
        commands += [["link", "set", cable, "netns", name],
                     [*inside, "addr", "add", f"10.77.0.{number}/24", "dev", cable],
                     [*inside, "link", "set", cable, "up"], [*inside, "link", "set", "lo", "up"]]
    try:
        for command in commands:
            done = subprocess.run(["ip", *command], capture_output=True, text=True)
            if done.returncode:
                pytest.skip(f"this machine does not let network namespaces be made: {done.stderr.strip()}")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


def test_two_network_namespaces_train_one_run(namespaces: list[str], tmp_path: Path, one_machine: Run):
    config, environments = write_config(tmp_path, **SETTINGS), machines(2, "10.77.0.1")
    commands = [["ip", "netns", "exec", name, sys.executable, str(SCRIPT)] for name in namespaces]
    for name, env in zip(namespaces, environments, strict=True):
        env["GLOO_SOCKET_IFNAME"] = f"v{name[-6:]}"  # gloo would ask for the address of the host name, which both share
    with Run(tmp_path, config, "run_name=net", ranks=1, env=environments[1], command=commands[1]) as second:
        first = run(tmp_path, config, "run_name=net", ranks=1, env=environments[0], command=commands[0])
        second.wait()
    assert (first.process.returncode, second.process.returncode) == (0, 0), first.console + second.console
    assert weights(first.run_dir) == weights(one_machine.run_dir)
