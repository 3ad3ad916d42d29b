"""Several nodes: two launchers of one process each, on loopback and in network namespaces of their
own.
"""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import uuid
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest

from helpers import SCRIPT
from helpers.config import STEPS, write_config
from helpers.launcher import Run, committed, fork, free_port, losses, run, train, weights

pytestmark = pytest.mark.real

ALL_STEPS = f"step {STEPS}/{STEPS}"


def nodes(count: int, address: str = "127.0.0.1", **more: str) -> list[dict[str, str]]:
    """The environment of each node."""
    port = str(free_port())
    return [
        {
            "NNODES": str(count),
            "NODE_RANK": str(rank),
            "MASTER_ADDR": address,
            "MASTER_PORT": port,
            **more,
        }
        for rank in range(count)
    ]


@pytest.fixture(scope="module")
def two_nodes(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Run]:
    """A run on two nodes, the second started first; node 0 chooses the split of its steps."""
    folder = tmp_path_factory.mktemp("two")
    sizes = dict(per_device_train_batch_size="auto", gradient_accumulation_steps=None)
    config = write_config(folder, report_to="swanlab", global_batch_size=2, **sizes)
    first, second = nodes(2)
    with Run(folder, config, "run_name=two", ranks=1, env=second) as late:
        early = run(folder, config, "run_name=two", ranks=1, env=first)
        late.wait()
    return early, late


def test_two_nodes_train_one_run_to_the_weights_of_one_node(
    two_nodes: tuple[Run, Run], reference: SimpleNamespace
):
    first, second = two_nodes
    assert (first.returncode, second.returncode) == (0, 0), first.console + second.console
    assert "x 2 processes x 1 accumulation = 2 samples per step (auto: " in first.console
    assert losses(first.run_dir) == losses(reference.run_dir)
    assert weights(first.run_dir) == weights(reference.run_dir)


def test_only_the_console_of_node_0_speaks(two_nodes: tuple[Run, Run]):
    first, second = two_nodes
    assert ALL_STEPS in first.console
    assert [
        line for line in second.console.splitlines() if not line.startswith("waiting for")
    ] == []


def test_two_nodes_make_one_run_directory_and_one_swanlab_record(two_nodes: tuple[Run, Run]):
    output = two_nodes[0].run_dir.parent
    assert sorted(path.name for path in output.iterdir()) == ["data.json", "swanlog", "two"]
    assert len(list((output / "swanlog").glob("run-*"))) == 1


def test_a_run_of_two_nodes_continues_on_one_when_the_other_is_gone(
    two_nodes: tuple[Run, Run], reference: SimpleNamespace
):
    copy = fork(two_nodes[0].run_dir, "one", 10)
    done = train(copy.parent, "--resume", copy, "report_to=none", ranks=1)
    assert "resharded   checkpoint-10: 2 ranks -> 1 rank" in done.console
    wanted = losses(reference.run_dir)
    for step, (loss,) in losses(done.run_dir).items():
        assert loss == pytest.approx(wanted[step][0], rel=5e-3), step  # bf16


def test_a_stop_on_node_1_stops_both_after_a_checkpoint(tmp_path: Path):
    config, (first, second) = write_config(tmp_path, num_train_epochs=20), nodes(2)
    with (
        Run(tmp_path, config, "run_name=stop", ranks=1, env=first) as leader,
        Run(tmp_path, config, "run_name=stop", ranks=1, env=second) as other,
    ):
        leader.reach(1)
        other.process.send_signal(signal.SIGTERM)
        assert (leader.wait(), other.wait()) == (143, 143), leader.console
        assert len(committed(leader.run_dir)) >= 1
        assert "stopped at step" in leader.console


SLOW = [{"point": "slow"}]  # node 1 is lost between two steps


@pytest.fixture(scope="module")
def troubled(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A run whose node 1 falls silent, comes back, and dies; node 0 is stopped while it waits for
    it, and resumed when it is back again.
    """
    folder = tmp_path_factory.mktemp("troubled")
    config, (first, second) = write_config(folder, hang_timeout=8), nodes(2)
    start = partial(Run, folder, config, "run_name=troubled", ranks=1)
    with start(env=first) as leader:
        with start(env=second, faults=SLOW) as silent:
            leader.reach(4)
            for pid in silent.pids():  # as with a node without power, no connection is closed
                os.kill(pid, signal.SIGSTOP)
            leader.see("restart 1 of 3")
        with start(env=second, faults=SLOW):
            leader.reach(8)
        leader.see("restart 2 of 3")
        leader.process.send_signal(signal.SIGINT)
        leader.wait(30)
    with start(env=second) as back:  # the old STOP file is still there
        resumed = run(folder, "--resume", leader.run_dir, ranks=1, env=first)
        back.wait()
    return SimpleNamespace(leader=leader, back=back, resumed=resumed, port=first["MASTER_PORT"])


def test_a_node_that_falls_silent_is_given_up_and_the_run_resumes_when_it_is_back(
    troubled: SimpleNamespace,
):
    found = re.search(
        r"^no progress for \d+ s: rank 0 in .*\nrestart 1 of 3: resuming from",
        troubled.leader.console,
        re.MULTILINE,
    )
    assert found and "restart" not in troubled.leader.console[: found.start()]


def test_a_node_that_dies_leaves_the_others_waiting_for_it(troubled: SimpleNamespace):
    resuming = r"restart (\d) of 3: resuming from checkpoint-(\d)\b"
    (one, silent), (two, dead) = re.findall(resuming, troubled.leader.console)
    assert (one, two) == ("1", "2") and int(silent) < int(dead)


def test_a_run_that_was_stopped_while_it_waited_for_a_lost_node_resumes(
    troubled: SimpleNamespace, reference: SimpleNamespace
):
    leader, resumed = troubled.leader, troubled.resumed
    assert leader.returncode == 130, leader.console
    variables = f"NNODES=2 NODE_RANK=0 MASTER_ADDR=127.0.0.1 MASTER_PORT={troubled.port}"
    command = f"{variables} NPROC_PER_NODE=1 python {SCRIPT} --resume {leader.run_dir}"
    assert f"resume      {command}" in leader.console
    assert (resumed.returncode, troubled.back.returncode) == (0, 0), resumed.console
    assert weights(leader.run_dir) == weights(reference.run_dir)


def test_a_node_that_waits_for_another_says_so_and_obeys_a_stop_at_once(tmp_path: Path):
    with Run(
        tmp_path, write_config(tmp_path), "run_name=alone", ranks=1, env=nodes(2)[0]
    ) as leader:
        leader.see(r"waiting for the other nodes at 127\.0\.0\.1:\d+, up to 15 minutes")
        leader.process.send_signal(signal.SIGTERM)
        assert leader.wait(30) == 143
        assert leader.left_after() == []
    assert f"state       stopped at step 0 of {STEPS}" in leader.console
    assert "failed" not in leader.console


def test_nodes_with_different_numbers_of_processes_are_refused(tmp_path: Path):
    config, (first, second) = write_config(tmp_path, deepspeed=None), nodes(2)
    with Run(tmp_path, config, "run_name=odd", ranks=2, env=second):
        leader = run(tmp_path, config, "run_name=odd", ranks=1, env=first)
    assert leader.returncode == 1
    assert "the nodes started different numbers of processes" in leader.console


def test_a_rendezvous_port_that_is_taken_is_named_as_the_cause(tmp_path: Path):
    """Taken between the preflight and torchrun: by node 0's own port check nothing listened there
    yet.
    """
    config, (first, _) = write_config(tmp_path, deepspeed=None), nodes(2)
    with (
        socket.socket() as server,
        Run(tmp_path, config, "run_name=p", ranks=1, env=first) as leader,
    ):
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        leader.see("waiting for the other nodes|^run ")
        server.bind(("127.0.0.1", int(first["MASTER_PORT"])))
        server.listen()
        assert leader.wait(120) == 1, leader.console
    assert "another process has taken the port of the rendezvous" in leader.console


@pytest.fixture(scope="module")
def namespaces(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[list[str]]]:
    """Two nodes joined by a virtual cable: what a command begins with to be run on each.

    To the first its own name, node-a, is 127.0.1.1, as Debian's installer writes it; to the
    second it is 192.168.78.1. (torchrun numbers the nodes by the text of their addresses: node 0
    comes first where it offers a loopback address.)
    """
    if os.geteuid() or not shutil.which("ip"):
        pytest.skip("making network namespaces takes root and the program ip")
    names = [f"launcher-{uuid.uuid4().hex[:6]}" for _ in range(2)]
    cables = [f"v{name[-6:]}" for name in names]
    commands = [["netns", "add", name] for name in names]
    commands += [["link", "add", cables[0], "type", "veth", "peer", "name", cables[1]]]
    for number, (name, cable) in enumerate(zip(names, cables, strict=True), 1):
        commands += [["link", "set", cable, "netns", name]]
        commands += [["-n", name, "addr", "add", f"192.168.78.{number}/24", "dev", cable]]
        commands += [["-n", name, "link", "set", device, "up"] for device in (cable, "lo")]
    begins, folder = [], tmp_path_factory.mktemp("hosts")
    for name, address in zip(names, ("127.0.1.1", "192.168.78.1"), strict=True):
        hosts = folder / name
        hosts.write_text(f"127.0.0.1 localhost\n{address} node-a\n", encoding="utf-8")
        inside = f'mount --bind {hosts} /etc/hosts && exec "$@"'
        begins.append(["ip", "netns", "exec", name, "unshare", "-m", "sh", "-c", inside, "sh"])
    try:
        for command in commands:
            done = subprocess.run(["ip", *command], capture_output=True, text=True)
            if done.returncode:
                pytest.skip(f"network namespaces cannot be made here: {done.stderr.strip()}")
        yield begins
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


@pytest.fixture(scope="module")
def cabled(
    namespaces: list[list[str]], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Run, Run]:
    """A run of the two nodes, which meet at the name node-a."""
    folder = tmp_path_factory.mktemp("cabled")
    config, ends = write_config(folder), []
    for env, begin in zip(nodes(2, "node-a"), namespaces, strict=True):
        # gloo would ask for the host name's address, which both share.
        env["GLOO_SOCKET_IFNAME"] = f"v{begin[3][-6:]}"
        ends.append({"env": env, "command": [*begin, sys.executable, str(SCRIPT)]})
    with Run(folder, config, "run_name=net", ranks=1, **ends[1]) as second:
        first = run(folder, config, "run_name=net", ranks=1, **ends[0])
        second.wait()
    return first, second


def test_two_nodes_meet_at_a_name_that_is_loopback_on_node_0(cabled: tuple[Run, Run]):
    first, second = cabled
    assert (first.returncode, second.returncode) == (0, 0), first.console + second.console


def test_two_network_namespaces_train_one_run(
    cabled: tuple[Run, Run], reference: SimpleNamespace
):
    assert weights(cabled[0].run_dir) == weights(reference.run_dir)
