"""Which GPUs a run gets, why, and how many processes that makes."""

import socket
import subprocess
import sys

import pytest
import yaml

import train_qwen3_ft as ft
from helpers import SCRIPT
from helpers.config import write_json
from helpers.launcher import FAKES, fake_gpus, free_port, says

UUID = "GPU-00000001-0000-4000-8000-000000000000"  # the fake NVML's GPU 1
MIG = "MIG-0a1b2c3d-1111-2222-3333-444455556666"


@pytest.fixture
def plan_on(plan_of, write_config):
    """The plan of a small full fine-tuning on a node with the fake GPUs `gpus`, with keys and
    environment as given.
    """

    def plan(gpus: list | None, env: dict | None = None, **keys: object) -> dict:
        return plan_of(write_config(use_cpu=None, **keys), gpus=gpus, env=env)

    return plan


def choose(
    asked: object = None, env: dict | None = None, gpus: list | None = None, **keys: object
) -> tuple[str, ...]:
    """resolve_devices(...).ids, for pure questions."""
    values = keys if asked is None else {"cuda_visible_devices": asked, **keys}
    return ft.resolve_devices(ft.Config("c.yaml", ft.Values(values)), env or {}, gpus).ids


# --- Who wins
# --------------------------------------------------------------------------------------------


def test_all_gpus_where_nothing_is_said(plan_on):
    plan = plan_on(fake_gpus(3))
    assert (plan["devices"], plan["world_size"]) == (["0", "1", "2"], 3)


def test_yaml_wins_over_all(plan_on):
    plan = plan_on(fake_gpus(4), cuda_visible_devices="1,3")
    assert (plan["devices"], plan["world_size"]) == (["1", "3"], 2)


def test_environment_wins_over_yaml(plan_on):
    plan = plan_on(fake_gpus(4), {"CUDA_VISIBLE_DEVICES": "2"}, cuda_visible_devices="0,1,2,3")
    assert (plan["devices"], plan["world_size"]) == (["2"], 1)


def test_override_wins_over_yaml(plan_of, write_config):
    plan = plan_of(
        write_config(use_cpu=None, cuda_visible_devices="0,1"),
        "cuda_visible_devices=2",
        gpus=fake_gpus(4),
    )
    assert plan["devices"] == ["2"]


def test_order_is_kept(plan_on):
    assert plan_on(fake_gpus(4), {"CUDA_VISIBLE_DEVICES": "3,0"})["devices"] == ["3", "0"]


def test_workers_see_the_chosen_gpus_as_nvidia_smi_numbers_them(plan_on):
    shown = plan_on(fake_gpus(4), cuda_visible_devices="1,3")["environment"]
    assert (shown["CUDA_VISIBLE_DEVICES"], shown["CUDA_DEVICE_ORDER"]) == ("1,3", "PCI_BUS_ID")


def test_what_a_scheduler_left_of_other_nodes_does_not_matter_on_one(plan_on):
    left = {"NODE_RANK": "1", "MASTER_ADDR": "node-001"}
    command = plan_on(fake_gpus(2), left)["command"]
    assert command[command.index("--rdzv-endpoint") + 1] == "127.0.0.1:0"
    assert ft.node_rank(left) == 0


def test_the_shown_command_names_the_gpus_of_the_environment_too(plan_on):
    assert (
        plan_on(fake_gpus(4), {"CUDA_VISIBLE_DEVICES": "0,1"})["environment"][
            "CUDA_VISIBLE_DEVICES"
        ]
        == "0,1"
    )


def test_one_process_for_each_gpu(plan_on):
    command = plan_on(fake_gpus(4), cuda_visible_devices="1,3")["command"]
    assert command[command.index("--nproc-per-node") + 1] == "2"


# --- The forms in which ids are given
# --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "ids"),
    [
        pytest.param(0, ("0",), id="int"),
        pytest.param("0,1", ("0", "1"), id="text"),
        pytest.param(" 0 , 1 ", ("0", "1"), id="spaces"),
        pytest.param([0, 1], ("0", "1"), id="list-of-int"),
        pytest.param(["0", "1"], ("0", "1"), id="list-of-text"),
        pytest.param([3], ("3",), id="list-of-one"),
        pytest.param(UUID, (UUID,), id="gpu-uuid"),
        pytest.param(MIG, (MIG,), id="mig-uuid"),
        pytest.param(f"MIG-{UUID}/1/0", (f"MIG-{UUID}/1/0",), id="old-mig-id"),
        pytest.param(f"{UUID},{MIG}", (UUID, MIG), id="both"),
        pytest.param("", (), id="empty-is-none"),
        pytest.param("-1", (), id="minus-one-is-none"),
        pytest.param(-1, (), id="minus-one-as-int-is-none"),
        pytest.param([], (), id="empty-list-is-none"),
        pytest.param("NoDevFiles", (), id="slurm-without-gpus-is-none"),
    ],
)
def test_ids_are_read_from(asked, ids):
    assert choose(asked) == ids


@pytest.mark.parametrize(
    ("text", "ids"),
    [("0,1", ("0", "1")), (" 1", ("1",)), ("", ()), ("-1", ()), (UUID, (UUID,))],
)
def test_ids_in_the_environment_are_read_likewise(text, ids):
    assert choose("7", {"CUDA_VISIBLE_DEVICES": text}) == ids


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        pytest.param("0,0", r"cuda_visible_devices: GPU 0 .*twice", id="duplicate"),
        pytest.param([1, 0, 1], r"GPU 1 .*twice", id="duplicate-in-a-list"),
        pytest.param("0 1", r"'0 1' is not a GPU id.*0,1", id="space-in-place-of-comma"),
        pytest.param("0;1", r"'0;1' is not a GPU id", id="semicolon"),
        pytest.param("two", r"'two' is not a GPU id", id="word"),
        pytest.param("cuda:0", r"'cuda:0' is not a GPU id", id="torch-name"),
        pytest.param("0,,1", r"'' is not a GPU id", id="empty-between"),
        pytest.param("0,-1", r"'-1' is not a GPU id", id="minus-one-among-others"),
        pytest.param(1.5, r"'1\.5' is not a GPU id", id="fraction"),
        pytest.param(True, r"'True' is not a GPU id", id="bool"),
        pytest.param("all", r"'all' is not a GPU id", id="all"),
    ],
)
def test_nonsense_is_refused(asked, message):
    with pytest.raises(ft.LaunchError, match=message):
        choose(asked)


def test_nonsense_in_the_environment_names_the_variable():
    with pytest.raises(ft.LaunchError, match=r"environment.*CUDA_VISIBLE_DEVICES.*'x'"):
        choose("0", {"CUDA_VISIBLE_DEVICES": "x"})


def test_nonsense_in_the_yaml_names_file_and_line(here, write_config):
    config = write_config(use_cpu=None, cuda_visible_devices="0,0")
    line = 1 + config.read_text().splitlines().index("cuda_visible_devices: 0,0")
    done = here(config, "--dry-run", gpus=fake_gpus(2))
    assert done.returncode == 2
    says(done.stderr, rf"config\.yaml:{line}: cuda_visible_devices: GPU 0 is named twice")


# --- Do they exist
# ---------------------------------------------------------------------------------------


def test_ids_that_do_not_exist_are_listed_with_those_that_do(here, write_config):
    done = here(
        write_config(use_cpu=None, cuda_visible_devices="1,2,5"),
        "--dry-run",
        gpus=[{"name": "NVIDIA A", "total": 80}, {"name": "NVIDIA B", "total": 80}],
    )
    assert done.returncode == 2
    says(
        done.stderr,
        r"config\.yaml:\d+: cuda_visible_devices: GPU 2,5 does not exist; "
        r"this node has 0 \(NVIDIA A\), 1 \(NVIDIA B\)",
    )


@pytest.mark.parametrize(
    ("uuid", "gpus"),
    [(UUID, 2), (UUID[:12], 2), (UUID[:7], 1)],
    ids=["full", "prefix", "short"],
)
def test_uuid_that_exists_is_accepted(plan_on, uuid, gpus):
    plan = plan_on(fake_gpus(gpus), cuda_visible_devices=uuid)
    assert (plan["devices"], plan["problems"]) == ([uuid], [])


def test_uuid_prefix_of_two_gpus_is_refused(plan_on):
    # The CUDA programming guide wants "enough digits to uniquely identify that GPU"; else no GPU is
    # visible.
    says(
        " ".join(plan_on(fake_gpus(2), cuda_visible_devices="GPU-0000")["problems"]), "GPU-0000"
    )


def test_uuid_that_does_not_exist_is_refused(plan_on):
    problems = plan_on(fake_gpus(2), cuda_visible_devices="GPU-ffff")["problems"]
    says(" ".join(problems), r"GPU GPU-ffff does not exist.*0 \(NVIDIA Test GPU\), 1")


def test_gpu_named_by_number_and_by_uuid_is_refused(plan_on):
    # torch reads either numbers or UUIDs and would start with fewer GPUs than processes.
    says(
        " ".join(plan_on(fake_gpus(2), cuda_visible_devices=f"1,{UUID}")["problems"]),
        rf"GPU 1\b|{UUID}",
    )


def test_mig_id_is_left_to_the_driver(plan_on):
    assert plan_on(fake_gpus(1), cuda_visible_devices=MIG)["problems"] == []


def test_memory_is_that_of_the_gpu_a_uuid_prefix_means(here, write_config):
    done = here(
        write_config(use_cpu=None, cuda_visible_devices=UUID[:12]),
        "--dry-run",
        gpus=[{"total": 80}, {"total": 40}, {"total": 80}],
    )
    assert "of 40.0 GiB" in done.stdout


def test_smallest_of_the_chosen_gpus_counts(here, write_config):
    done = here(
        write_config(use_cpu=None, cuda_visible_devices="0,2"),
        "--dry-run",
        gpus=[{"total": 80}, {"total": 24}, {"total": 48}],
    )
    assert "of 48.0 GiB" in done.stdout


# --- Number of processes
# ---------------------------------------------------------------------------------


def test_fewer_processes_take_the_first_gpus(plan_on):
    plan = plan_on(fake_gpus(4), {"NPROC_PER_NODE": "2"}, cuda_visible_devices="3,1,0")
    assert (plan["devices"], plan["world_size"]) == (["3", "1"], 2)


def test_more_processes_than_gpus_are_refused(plan_on):
    problems = plan_on(fake_gpus(2), {"NPROC_PER_NODE": "3"})["problems"]
    says(" ".join(problems), r"NPROC_PER_NODE.*3 .*2 GPUs")


@pytest.mark.parametrize("text", ["0", "-1", "two", "1.5"])
def test_process_count_that_is_no_count_is_refused(here, write_config, text):
    done = here(write_config(), "--dry-run", env={"NPROC_PER_NODE": text})
    assert done.returncode == 2
    says(done.stderr, r"NPROC_PER_NODE.*whole number")


def test_nodes_multiply_the_processes(plan_on):
    env = {
        "NNODES": "2",
        "NODE_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }
    plan = plan_on(fake_gpus(4), env, run_name="two")
    assert (plan["world_size"], plan["problems"]) == (8, [])


# --- CPU
# -------------------------------------------------------------------------------------------------


def test_use_cpu_takes_no_gpu(plan_of, write_config):
    plan = plan_of(write_config(cuda_visible_devices="0,1"), gpus=fake_gpus(2))
    assert (
        plan["devices"],
        plan["world_size"],
        plan["environment"]["CUDA_VISIBLE_DEVICES"],
    ) == (
        [],
        1,
        "",
    )


def test_use_cpu_takes_as_many_processes_as_asked(plan_of, write_config):
    assert plan_of(write_config(), env={"NPROC_PER_NODE": "2"})["world_size"] == 2


@pytest.mark.parametrize("value", ["yes", "on", "True", "'true'"])
def test_use_cpu_in_other_words(plan_of, write_config, value):
    plan = plan_of(write_config(), f"use_cpu={value}")
    assert (plan["devices"], plan["problems"]) == ([], [])


# --- The reason is printed
# -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("yaml", "env", "line"),
    [
        pytest.param(
            "0,1,2,3",
            "0,1",
            r"GPUs 0,1 \(from CUDA_VISIBLE_DEVICES, which wins over the config's 0,1,2,3\), 2 proc",
            id="environment-over-yaml",
        ),
        pytest.param(
            "0,1", "0,1", r"GPUs 0,1 \(from CUDA_VISIBLE_DEVICES\), 2 proc", id="both-agree"
        ),
        pytest.param(
            None,
            "1",
            r"GPU 1 \(from CUDA_VISIBLE_DEVICES\), 1 process\b",
            id="environment-alone",
        ),
        pytest.param(
            "2",
            None,
            r"GPU 2 \(from .*cuda_visible_devices.*\), 1 process\b",
            id="yaml",
        ),
        pytest.param(None, None, r"GPUs 0,1,2,3 \(all GPUs of this node\), 4 proc", id="all"),
    ],
)
def test_plan_says_which_gpus_and_why(here, write_config, yaml, env, line):
    done = here(
        write_config(use_cpu=None, cuda_visible_devices=yaml),
        "--dry-run",
        gpus=fake_gpus(4),
        env={} if env is None else {"CUDA_VISIBLE_DEVICES": env},
    )
    says(done.stdout, rf"devices +{line}")


def test_plan_says_that_a_cpu_is_used_and_why(here, write_config):
    says(
        here(write_config(), "--dry-run", env={"NPROC_PER_NODE": "2"}).stdout,
        r"devices +CPU \(use_cpu: true\), 2 processes",
    )


# --- Busy, no driver, no NVML
# ----------------------------------------------------------------------------


BUSY = [{"total": 80, "used": 60, "processes": [[4711, 59.5]]}, {"total": 80, "used": 0.4}]


def test_busy_gpu_is_refused_with_its_memory_and_its_user(here, write_config):
    done = here(write_config(use_cpu=None, cuda_visible_devices="0"), "--dry-run", gpus=BUSY)
    assert done.returncode == 2
    says(done.stderr, r"GPU 0 is busy: 60\.0 GiB in use by pid 4711 \(59\.5 GiB\).*--force")


def test_busy_gpu_that_is_named_by_uuid_prefix_is_refused(here, write_config):
    done = here(
        write_config(use_cpu=None, cuda_visible_devices="GPU-00000000"), "--dry-run", gpus=BUSY
    )
    says(done.stderr, r"GPU 0 is busy")


def test_force_starts_on_a_busy_gpu(here, write_config):
    done = here(
        write_config(use_cpu=None, cuda_visible_devices="0"), "--dry-run", "--force", gpus=BUSY
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_force_does_not_start_on_a_gpu_that_does_not_exist(here, write_config):
    done = here(
        write_config(use_cpu=None, cuda_visible_devices="7"), "--dry-run", "--force", gpus=BUSY
    )
    assert done.returncode == 2
    assert "GPU 7 does not exist" in done.stderr


def test_gpu_that_is_busy_but_not_chosen_does_not_matter(here, write_config):
    assert (
        here(
            write_config(use_cpu=None, cuda_visible_devices="1"), "--dry-run", gpus=BUSY
        ).returncode
        == 0
    )


def without_nvml(tmp_path, clean_env, *args: object) -> subprocess.CompletedProcess:
    """The launcher where `import pynvml` fails."""
    (tmp_path / "blocked").mkdir()
    (tmp_path / "blocked" / "pynvml.py").write_text("raise ImportError('hidden')\n")
    env = {**clean_env, "PYTHONPATH": f"{tmp_path / 'blocked'}:{FAKES}"}
    return subprocess.run(
        [sys.executable, SCRIPT, *map(str, args)],
        env=env,
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )


def test_without_nvml_the_launcher_continues(tmp_path, clean_env, write_config):
    done = without_nvml(
        tmp_path, clean_env, write_config(use_cpu=None, cuda_visible_devices="0,1"), "--dry-run"
    )
    assert done.returncode == 0, done.stderr
    says(done.stdout, r"devices +GPUs 0,1 ")


def test_without_nvml_the_launcher_says_that_gpus_were_not_checked(
    tmp_path, clean_env, write_config
):
    done = without_nvml(
        tmp_path, clean_env, write_config(use_cpu=None, cuda_visible_devices="0,1"), "--dry-run"
    )
    says(done.stdout + done.stderr, r"not checked.*nvidia-ml-py")


def test_without_nvml_and_without_ids_the_user_is_asked_for_them(
    tmp_path, clean_env, write_config
):
    done = without_nvml(tmp_path, clean_env, write_config(use_cpu=None), "--dry-run")
    assert done.returncode == 2
    says(done.stderr, r"nvidia-ml-py is not installed")


def test_default_config_without_a_driver_is_one_clear_message(launcher, tmp_path, root):
    done = launcher(gpus=None)
    about_gpus = [line for line in done.stderr.splitlines() if "GPU" in line]
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert len(about_gpus) == 1
    says(about_gpus[0], r"no NVIDIA driver.*python train_qwen3_ft\.py configs/demo_cpu\.yaml")
    assert not (tmp_path / "saves").exists()


def test_default_config_without_a_driver_names_only_what_is_missing(launcher):
    # Memory and disk of a node that cannot train at all do not matter yet.
    assert len(launcher(gpus=None).stderr.splitlines()) == 1


def test_driver_without_a_gpu_is_refused(here, write_config):
    done = here(write_config(use_cpu=None), "--dry-run", gpus=[])
    assert done.returncode == 2
    says(done.stderr, r"no GPU to train on.*configs/demo_cpu\.yaml")


@pytest.mark.parametrize("text", ["", "-1"])
def test_environment_that_hides_all_gpus_is_named(here, write_config, text):
    done = here(
        write_config(use_cpu=None),
        "--dry-run",
        gpus=fake_gpus(2),
        env={"CUDA_VISIBLE_DEVICES": text},
    )
    assert done.returncode == 2
    says(done.stderr, r"CUDA_VISIBLE_DEVICES: no GPU to train on")


@pytest.mark.parametrize("options", [["--dry-run"], []], ids=["dry-run", "launch"])
def test_environment_that_hides_all_gpus_shows_no_plan_of_0_processes(
    here, write_config, options
):
    done = here(
        write_config(use_cpu=None),
        *options,
        gpus=fake_gpus(2),
        env={"CUDA_VISIBLE_DEVICES": ""},
    )
    assert (done.returncode, done.stdout) == (2, "")


# --- The torchrun command
# --------------------------------------------------------------------------------


def test_command_is_torchrun_on_the_script_with_the_run_s_config(plan_on):
    command = plan_on(fake_gpus(2))["command"]
    assert command[:3] == [sys.executable, "-P", "-c"]
    assert "torch.distributed.run" in command[3]
    assert command[-2] == str(SCRIPT)
    assert command[-1].endswith("/config.yaml")


def test_command_uses_a_free_port_unless_one_is_set(tmp_path):
    devices = ft.resolve_devices(ft.Config("c.yaml", ft.Values(use_cpu=True)), {}, [])
    assert "127.0.0.1:0" in ft.build_torchrun_command(devices, tmp_path / "config.yaml", {})
    assert "127.0.0.1:29555" in ft.build_torchrun_command(
        devices, tmp_path / "config.yaml", {"MASTER_PORT": "29555"}
    )


def test_command_leaves_the_environment_it_was_given_alone(tmp_path):
    env = {"CUDA_VISIBLE_DEVICES": "0"}
    ft.build_torchrun_command(
        ft.resolve_devices(ft.Config("c.yaml", ft.Values()), env, None),
        tmp_path / "config.yaml",
        env,
    )
    assert env == {"CUDA_VISIBLE_DEVICES": "0"}


@pytest.mark.parametrize(
    ("env", "message"),
    [
        pytest.param({"NNODES": "two"}, r"NNODES.*whole number.*two", id="nnodes-no-number"),
        pytest.param({"NNODES": "2"}, r"NODE_RANK.*NNODES=2", id="node-rank-missing"),
        pytest.param(
            {"NNODES": "2", "NODE_RANK": "0", "MASTER_PORT": "29500"},
            r"MASTER_ADDR",
            id="master-addr-missing",
        ),
        pytest.param(
            {"NNODES": "2", "NODE_RANK": "2", "MASTER_ADDR": "a", "MASTER_PORT": "29500"},
            r"NODE_RANK.*2",
            id="node-rank-too-large",
        ),
        pytest.param(
            {"NNODES": "2", "NODE_RANK": "one", "MASTER_ADDR": "a", "MASTER_PORT": "29500"},
            r"NODE_RANK.*one",
            id="node-rank-no-number",
        ),
        pytest.param({"MASTER_PORT": "ssh"}, r"MASTER_PORT.*number.*ssh", id="port-no-number"),
        pytest.param(
            {"MASTER_PORT": "70000"}, r"MASTER_PORT.*65535.*70000", id="port-too-large"
        ),
    ],
)
def test_environment_of_several_nodes_is_checked(here, write_config, env, message):
    done = here(write_config(run_name="r"), "--dry-run", env=env)
    assert done.returncode == 2
    says(done.stderr, message)


def test_several_nodes_need_a_run_name(here, write_config):
    env = {
        "NNODES": "2",
        "NODE_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }
    says(here(write_config(), "--dry-run", env=env).stderr, r"run_name.*NNODES=2")


def test_port_in_use_is_refused(here, write_config):
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        port = str(server.getsockname()[1])
        done = here(write_config(), "--dry-run", env={"MASTER_PORT": port})
    says(done.stderr, rf"MASTER_PORT: port {port} is in use")


def test_missing_gpu_does_not_hide_another_problem(here, write_config, tmp_path):
    write_json(tmp_path / "data" / "dataset_info.json", {"other": {"file_name": "tiny.json"}})
    done = here(write_config(use_cpu=None), "--dry-run", gpus=[])
    says(done.stderr, "no GPU")
    says(done.stderr, "tiny is not in")


def test_missing_gpu_does_not_hide_that_no_sample_is_left(here, write_config):
    done = here(write_config(use_cpu=None, val_size=5000), "--dry-run", gpus=[])
    for text in ("no GPU", "leaves no sample"):
        assert text in done.stderr, done.stderr


def test_json_reports_the_devices_problems_too(plan_on):
    problems = plan_on(fake_gpus(1), cuda_visible_devices="0,3")["problems"]
    assert any("GPU 3 does not exist" in text for text in problems)


def test_an_old_gpu_hides_no_other_problem(write_config, launcher):
    """What --force may ignore of the devices must not keep the memory from being checked."""
    config = write_config(bf16=True, val_size=5000)
    old = fake_gpus(1, capability=[7, 5], used=20)
    done = launcher(config, "use_cpu=false", gpus=old)
    assert done.returncode == 2
    for text in ("bf16", "is busy", "leaves no sample"):
        assert text in done.stderr, done.stderr


# --- GPUs that are lost, and what a run's configuration keeps of the devices


LOST = [*fake_gpus(1), *fake_gpus(1, lost=True), *fake_gpus(1)]


def test_a_lost_gpu_is_left_out_and_the_others_are_used(plan_on, here, write_config):
    assert plan_on(LOST)["devices"] == ["0", "2"]
    shown = here(write_config(use_cpu=None), "--dry-run", gpus=LOST).stdout
    assert "GPU 1 is left out (NVML: GPU is lost)" in shown


def test_a_lost_gpu_is_named_where_it_is_asked_for(plan_on):
    [problem] = plan_on(LOST, cuda_visible_devices="0,1")["problems"]
    says(problem, r"GPU 1 does not exist; this node has 0 .*, 2 .*GPU is lost")


@pytest.mark.parametrize("asked", [None, "3,2,1,0"], ids=["all", "chosen"])
def test_the_configuration_of_a_run_holds_the_gpus_only_where_it_chose_them(asked):
    keys = {} if asked is None else {"cuda_visible_devices": asked}
    config = ft.Config("c.yaml", ft.Values(stage="sft", **keys)).update(run_name="first")
    text = ft.launchable_config(config, ft.Devices(("0", "1"), "", 2))
    assert yaml.safe_load(text).get("cuda_visible_devices") == asked
    assert "\n#   CUDA_VISIBLE_DEVICES=0,1 python " in text
