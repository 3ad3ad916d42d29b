"""Command line, YAML, overrides, paths and secrets."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml as pyyaml

import train_qwen3_ft as ft
from helpers import ROOT, SCRIPT
from helpers.config import write_json
from helpers.launcher import says


def read(tmp_path: Path, text: str | bytes, **overrides: str) -> dict:
    """The values of a configuration file with this content."""
    path = tmp_path / "read.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return ft.load_config(path, overrides).values


# --- YAML: what a value arrives as
# -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value"),
    [
        pytest.param("1e-5", 1e-5, id="exponent-without-a-point"),
        pytest.param("1.0e-5", 1e-5, id="exponent-with-a-point"),
        pytest.param("1E-5", 1e-5, id="capital-exponent"),
        pytest.param("5e4", 5e4, id="positive-exponent"),
        pytest.param("-3e+2", -300.0, id="signed-exponent"),
        pytest.param(".5", 0.5, id="leading-point"),
        pytest.param("3.", 3.0, id="trailing-point"),
        pytest.param("1_000", 1000, id="underscores"),
        pytest.param("0o17", 15, id="octal"),
        pytest.param("0x1F", 31, id="hexadecimal"),
        pytest.param("-1", -1, id="negative"),
        pytest.param("0", 0, id="zero"),
        pytest.param("no", "no", id="the-word-no"),
        pytest.param("on", "on", id="the-word-on"),
        pytest.param("yes", "yes", id="the-word-yes"),
        pytest.param("off", "off", id="the-word-off"),
        pytest.param("true", True, id="true"),
        pytest.param("False", False, id="false"),
        pytest.param("'1e-5'", "1e-5", id="quoted-number-stays-text"),
        pytest.param("12:30:45", "12:30:45", id="no-sexagesimal-numbers"),
        pytest.param("2024-05-01", "2024-05-01", id="no-dates"),
        pytest.param("1.2.3", "1.2.3", id="version-is-text"),
        pytest.param("[1e-5, no]", [1e-5, "no"], id="inside-a-list"),
        pytest.param("{a: 1e-5}", {"a": 1e-5}, id="inside-a-mapping"),
    ],
)
def test_yaml_value_arrives_with_its_type(tmp_path, text, value):
    found = read(tmp_path, f"key: {text}\n")["key"]
    assert (found, type(found)) == (value, type(value))


def test_inf_is_a_number(tmp_path):
    assert read(tmp_path, "key: .inf\n")["key"] == float("inf")


@pytest.mark.parametrize("text", ["", "null", "~"])
def test_null_means_not_given(tmp_path, text):
    assert "eval_steps" not in read(tmp_path, f"stage: sft\neval_steps: {text}\n")


def test_byte_order_mark_is_no_part_of_the_first_key(tmp_path):
    assert read(tmp_path, "stage: sft\n".encode("utf-8-sig")) == {"stage": "sft"}


def test_windows_line_ends_are_accepted(tmp_path):
    assert read(tmp_path, b"stage: sft\r\ntemplate: qwen3\r\n") == {
        "stage": "sft",
        "template": "qwen3",
    }


def test_anchors_and_merge_keys_work(tmp_path):
    assert read(tmp_path, "a: &a {x: 1}\nb: {<<: *a, y: 2}\n")["b"] == {"x": 1, "y": 2}


# --- YAML: what is refused, with file and line
# -----------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param(
            b"stage: sft\nseed: 1\nstage: pt\n",
            r"bad\.yaml:3: .*stage.*duplicate.*line 1",
            id="duplicate-key",
        ),
        pytest.param(
            b"a:\n  x: 1\n  x: 2\n",
            r"bad\.yaml:3: .*x.*duplicate.*line 2",
            id="duplicate-key-inside",
        ),
        pytest.param(b"stage: sft\n\tseed: 1\n", r"bad\.yaml:2: .*tab", id="tab"),
        pytest.param(
            b"stage: sft\nval:\n\tseed: 1\n", r"bad\.yaml:3: .*tab", id="tab-as-indentation"
        ),
        pytest.param(
            b"- stage: sft\n- seed: 1\n",
            r"bad\.yaml:1: .*key: value.*list",
            id="list-at-top-level",
        ),
        pytest.param(b"just text\n", r"bad\.yaml:1: .*key: value", id="text-at-top-level"),
        pytest.param(b"", r"bad\.yaml:1: .*empty", id="empty-file"),
        pytest.param(b"# nothing but a comment\n", r"bad\.yaml:1: .*empty", id="comments-only"),
        pytest.param(b"{}\n", r"bad\.yaml:1: .*key: value", id="empty-mapping"),
        pytest.param(b"stage: sft\nname: caf\xe9\n", r"bad\.yaml:2: .*UTF-8", id="latin-1"),
        pytest.param("stage: sft\n".encode("utf-16"), r"bad\.yaml:1: .*UTF-8", id="utf-16"),
        pytest.param(
            b"stage: sft\n---\nstage: pt\n", r"bad\.yaml:2: .*document", id="two-documents"
        ),
        pytest.param(
            b"stage: sft\nlist: [1, 2\nseed: 1\n",
            r"bad\.yaml:3: .*not valid YAML",
            id="unclosed-list",
        ),
        pytest.param(b"stage: 'sft\n", r"bad\.yaml:\d: .*not valid YAML", id="unclosed-quote"),
        pytest.param(
            b"stage: sft\nseed: *nowhere\n", r"bad\.yaml:2: .*nowhere", id="unknown-alias"
        ),
        pytest.param(
            b"stage: sft\nx: !!python/object/apply:os.system ['true']\n",
            r"bad\.yaml:2: .*python/object",
            id="python-object",
        ),
        pytest.param(b"stage: sft\n1: 2\n", r"bad\.yaml:2: .*1.*word", id="number-as-key"),
        pytest.param(b"stage: sft\n? [a, b]\n: 2\n", r"bad\.yaml:2: ", id="list-as-key"),
        pytest.param(
            b"stage: sft\nname: a\x00b\n", r"bad\.yaml.*not valid YAML", id="control-character"
        ),
    ],
)
def test_unusable_yaml_is_one_line_with_file_and_line(tmp_path, here, content, message):
    path = tmp_path / "bad.yaml"
    path.write_bytes(content)
    done = here(path, "--dry-run")
    assert done.returncode == 2
    says(done.stderr, message)
    assert len(done.stderr.splitlines()) == 1


def test_missing_file_is_named_with_the_demo_command(here, tmp_path):
    done = here(tmp_path / "nowhere.yaml", "--dry-run")
    assert done.returncode == 2
    says(done.stderr, r"nowhere\.yaml.*no such file.*configs/demo_cpu\.yaml")


def test_folder_in_place_of_the_file_is_one_line(here, tmp_path):
    done = here(tmp_path, "--dry-run")
    assert done.returncode == 2
    says(done.stderr, rf"{tmp_path}.*directory.*YAML file")


# --- Overrides
# -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2e-5", 2e-5),
        ("[a, b]", ["a", "b"]),
        ("{stage: 3}", {"stage": 3}),
        ("'0,1'", "0,1"),
        ("no", "no"),
        ("true", True),
        ("a=b", "a=b"),
        ("a b", "a b"),
        ("a: 1", {"a": 1}),
        ("- a", ["a"]),
    ],
)
def test_override_is_parsed_as_yaml_and_wins_over_the_file(tmp_path, text, value):
    assert read(tmp_path, "key: old\nstage: sft\n", key=text) == {"key": value, "stage": "sft"}


@pytest.mark.parametrize("text", ["", "null"])
def test_override_with_nothing_takes_the_key_out(tmp_path, text):
    assert read(tmp_path, "key: old\nstage: sft\n", key=text) == {"stage": "sft"}


def test_override_adds_a_key(tmp_path):
    assert read(tmp_path, "stage: sft\n", seed="7") == {"stage": "sft", "seed": 7}


def test_override_that_is_no_yaml_is_named(here, write_config):
    done = here(write_config(), "dataset=[a", "--dry-run")
    assert done.returncode == 2
    says(done.stderr, r"command line.*dataset.*not valid YAML")


def test_problem_in_an_override_is_placed_on_the_command_line(here, write_config):
    done = here(write_config(), "num_train_epochs=three", "--dry-run")
    says(done.stderr, r"command line: num_train_epochs: expected a number, got 'three'")


def test_overrides_stand_before_after_and_between(plan_of, write_config):
    plan = plan_of(
        "num_train_epochs=2",
        write_config(),
        "per_device_train_batch_size=4",
        "gradient_accumulation_steps=1",
    )
    assert plan["total_steps"] == 10


def test_the_last_of_two_equal_overrides_wins(plan_of, write_config):
    assert plan_of(write_config(), "max_steps=3", "max_steps=4")["total_steps"] == 4


# --- Command line
# ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "message"),
    [
        pytest.param(
            ["a.yaml", "b.yaml"], r"one CONFIG\.yaml.*a\.yaml b\.yaml", id="two-configs"
        ),
        pytest.param(["--dryrun"], r"--dryrun.*--help", id="unknown-option"),
        pytest.param(["--dry"], r"--dry.*--help", id="abbreviated-option"),
        pytest.param(["--json"], r"--json.*--dry-run", id="json-without-dry-run"),
        pytest.param(
            ["--force=yes"], r"--force.*--help", id="option-with-a-value-it-does-not-take"
        ),
        pytest.param(
            ["--learning_rate", "1e-5"], r"learning_rate.*--help", id="key-written-as-an-option"
        ),
    ],
)
def test_command_line_mistake_is_one_line(here, args, message):
    done = here(*args)
    assert (done.returncode, done.stdout) == (2, "")
    says(done.stderr, message)
    assert len(done.stderr.splitlines()) == 1


def test_help_is_the_manual(launcher):
    done = launcher("--help")
    assert done.returncode == 0
    assert all(
        word in done.stdout
        for word in ("--dry-run", "--resume", "--force", "configs/demo_cpu.yaml", "Exit codes")
    )


# --- Paths
# -----------------------------------------------------------------------------------------------


@pytest.fixture
def elsewhere(tmp_path):
    """A copy of the script in a folder of its own, with a data and a model folder beside it."""
    folder = tmp_path / "größe und 表" / "script folder"
    write_json(folder / "data" / "dataset_info.json", {"tiny": {"file_name": "tiny.json"}})
    write_json(folder / "data" / "tiny.json", [{"instruction": "a", "output": "b"}] * 7)
    shutil.copy(SCRIPT, folder / SCRIPT.name)
    return folder


def test_input_is_looked_up_in_the_working_directory_first(
    tmp_path, elsewhere, write_config, launcher
):
    config = write_config(dataset_dir="data")
    done = launcher(config, "--dry-run", script=elsewhere / SCRIPT.name, cwd=tmp_path)
    says(done.stdout, r"^steps +20 samples")


def test_input_is_looked_up_beside_the_script_next(elsewhere, write_config, launcher, tmp_path):
    config = write_config(dataset_dir="data")
    (tmp_path / "empty").mkdir()
    done = launcher(config, "--dry-run", script=elsewhere / SCRIPT.name, cwd=tmp_path / "empty")
    says(done.stdout, r"^steps +7 samples")


def test_output_is_in_the_working_directory(elsewhere, write_config, launcher, tmp_path):
    (tmp_path / "empty").mkdir()
    (elsewhere / "saves").mkdir()
    done = launcher(
        write_config(output_dir="saves"),
        "--dry-run",
        script=elsewhere / SCRIPT.name,
        cwd=tmp_path / "empty",
    )
    assert str(tmp_path / "empty" / "saves") in done.stdout
    assert str(elsewhere / "saves") not in done.stdout


def test_spaces_and_other_alphabets_in_every_path(tmp_path, write_config, launcher, elsewhere):
    place = tmp_path / "größe und 表"
    config = write_config(
        name="größe und 表/конфиг один.yaml", output_dir=str(place / "aus gabe")
    )
    done = launcher(config, "--dry-run", script=elsewhere / SCRIPT.name, cwd=place)
    assert done.returncode == 0, done.stderr
    assert str(place / "aus gabe") in done.stdout


def test_default_config_is_found_from_any_directory(launcher, tmp_path):
    done = launcher("--dry-run", cwd=tmp_path)
    assert "Qwen/Qwen3-14B" in done.stdout


@pytest.mark.parametrize(
    "key", ["model_name_or_path", "dataset_dir", "deepspeed", "output_dir"]
)
def test_relative_path_becomes_absolute(tmp_path, monkeypatch, key):
    (tmp_path / "there").mkdir()
    monkeypatch.chdir(tmp_path)
    assert read(tmp_path, f"{key}: there\n")[key] == str(tmp_path / "there")


def test_hub_id_stays_as_it_is(tmp_path):
    assert (
        read(tmp_path, "model_name_or_path: Qwen/Qwen3-14B\n")["model_name_or_path"]
        == "Qwen/Qwen3-14B"
    )


def test_tilde_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert read(tmp_path, "output_dir: ~/runs\n")["output_dir"] == str(tmp_path / "runs")


# --- What reaches LLaMA-Factory
# --------------------------------------------------------------------------


def test_training_args_have_no_key_of_the_launcher(tmp_path):
    (tmp_path / "c.yaml").write_text(
        "stage: sft\ncuda_visible_devices: '0'\nglobal_batch_size: 8\nmax_restarts: 2\n"
    )
    args = ft.build_training_args(
        ft.load_config(tmp_path / "c.yaml", {}), ft.Run(tmp_path / "run"), None
    )
    assert args["stage"] == "sft"
    assert not {"cuda_visible_devices", "global_batch_size", "max_restarts"} & set(args)


def test_training_args_write_into_the_run_directory(tmp_path):
    (tmp_path / "c.yaml").write_text("output_dir: somewhere\n")
    args = ft.build_training_args(
        ft.load_config(tmp_path / "c.yaml", {}), ft.Run(tmp_path / "run"), None
    )
    assert args["output_dir"] == str(tmp_path / "run")


def test_training_args_leave_swanlab_to_the_launcher(tmp_path):
    (tmp_path / "c.yaml").write_text(
        "report_to: [swanlab, tensorboard]\nuse_swanlab: true\nswanlab_project: p\n"
    )
    args = ft.build_training_args(
        ft.load_config(tmp_path / "c.yaml", {}), ft.Run(tmp_path / "run"), None
    )
    assert args["report_to"] == ["tensorboard"]
    assert not [key for key in args if "swanlab" in key]


@pytest.mark.parametrize(("epochs", "trains"), [(1.0, False), (2.0, True)])
def test_a_finished_run_of_unknown_length_trains_on_where_more_epochs_are_wanted(
    tmp_path, epochs, trains
):
    run = ft.Run(tmp_path / "run")
    state = {"epoch": 1.0, "global_step": 7, "max_steps": 7}
    write_json(run.path / "checkpoint-7" / "trainer_state.json", state)
    ft.commit_checkpoint(run.path / "checkpoint-7", 1)
    (tmp_path / "c.yaml").write_text(f"packing: true\nnum_train_epochs: {epochs}\n")
    args = ft.build_training_args(
        ft.load_config(tmp_path / "c.yaml", {}), run, run.newest_checkpoint()
    )
    assert (args["num_train_epochs"] > 0) == trains


# --- Secrets
# ---------------------------------------------------------------------------------------------

SECRET = "s3cr3t-0123456789"
SECRET_KEYS = [
    "swanlab_api_key",
    "hf_hub_token",
    "hub_token",
    "ms_hub_token",
    "om_hub_token",
    "push_to_hub_token",
]
# What the hubs' libraries read in the environment, or the launcher keeps to itself.
KEPT = {
    "swanlab_api_key",
    "hf_hub_token",
    "hub_token",
}
SECRET_VARIABLES = ["SWANLAB_API_KEY", "HF_TOKEN", "WANDB_API_KEY", "MODELSCOPE_API_TOKEN"]


def test_the_trainer_gets_no_secret_that_it_does_not_need(tmp_path):
    """A tracker may upload its arguments."""
    plan = SimpleNamespace(
        devices=ft.Devices((), "", 1),
        zero=ft.Zero(),
        values=ft.Values(report_to="none"),
        data={},
    )
    config = SimpleNamespace(secrets=dict.fromkeys(SECRET_KEYS, SECRET))
    found = SimpleNamespace(plan=plan, config=config, force=False)
    env = ft.build_rank_environment(found, ft.Run(tmp_path), {})
    handover = json.loads(env[ft.HANDOVER_VARIABLE])
    assert handover["secrets"].keys() == set(SECRET_KEYS) - KEPT


@pytest.mark.parametrize(
    "options", [["--dry-run"], ["--dry-run", "--json"]], ids=["text", "json"]
)
@pytest.mark.parametrize("given", ["yaml", "override", "environment"])
def test_secret_is_never_shown(here, write_config, given, options):
    in_file = dict.fromkeys(SECRET_KEYS, SECRET) if given == "yaml" else {}
    words = [f"{key}={SECRET}" for key in SECRET_KEYS] if given == "override" else []
    env = dict.fromkeys(SECRET_VARIABLES, SECRET) if given == "environment" else {}
    done = here(write_config(report_to="swanlab", **in_file), *words, *options, env=env)
    assert "SwanLab" in done.stdout or '"total_steps"' in done.stdout
    assert SECRET not in done.stdout + done.stderr


def test_secret_never_stays_among_the_values(tmp_path):
    values = read(
        tmp_path, "stage: sft\n" + "".join(f"{key}: {SECRET}\n" for key in SECRET_KEYS)
    )
    assert values == {"stage": "sft"}


@pytest.mark.parametrize(
    "word",
    [
        pytest.param(f"swanlab_api_key=[{SECRET}", id="broken-yaml"),
        pytest.param(f"wandb_api_key={SECRET}", id="unknown-key"),
        pytest.param(f"HF_TOKEN={SECRET}", id="variable-as-key"),
        pytest.param(f"--swanlab_api_key={SECRET}", id="as-an-option"),
        pytest.param(f"swanlab-api-key={SECRET}", id="with-hyphens"),
        pytest.param(f"hf_hub_token = {SECRET}", id="with-spaces"),
        pytest.param(f"hf_hub_token= {SECRET}", id="with-a-space-after"),
        pytest.param(f"hf_hub_token ={SECRET}", id="with-a-space-before"),
    ],
)
def test_mistyped_secret_is_not_repeated_in_the_message(here, write_config, word):
    done = here(write_config(), *word.split(), "--dry-run")
    assert done.returncode == 2
    assert SECRET not in done.stdout + done.stderr


@pytest.mark.parametrize(
    "line",
    [
        f"hf_hub_token: '{SECRET}",
        f"hf_hub_token: [{SECRET}",
        f"hf_hub_token: a\nhf_hub_token: {SECRET}",
        f"hf_hub_token\n{SECRET}: 1",
        f"hf_hub_token = {SECRET}",
    ],
    ids=["quote", "list", "duplicate", "without-colon", "equals-sign"],
)
def test_broken_line_with_a_secret_is_not_repeated_in_the_message(here, tmp_path, line):
    (tmp_path / "bad.yaml").write_text(f"stage: sft\n{line}\n")
    done = here(tmp_path / "bad.yaml", "--dry-run")
    assert done.returncode == 2
    assert SECRET not in done.stdout + done.stderr


# --- Import and start
# ------------------------------------------------------------------------------------


@pytest.fixture
def bare_python(tmp_path, clean_env):
    """Run code in a Python that finds the standard library, PyYAML and the script, and nothing
    else.
    """
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "yaml").symlink_to(Path(pyyaml.__file__).parent)

    def run(code: str) -> subprocess.CompletedProcess:
        env = {**clean_env, "PYTHONPATH": f"{bare}{os.pathsep}{ROOT}"}
        return subprocess.run(
            [sys.executable, "-S", "-c", code],
            env=env,
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )

    return run


def test_import_needs_only_pyyaml_and_prints_nothing(bare_python):
    done = bare_python("import train_qwen3_ft")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_python_without_pyyaml_gets_one_line():
    done = subprocess.run(
        [sys.executable, "-S", str(ROOT / "train_qwen3_ft.py")], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert (
        done.stderr
        == "error: package pyyaml is not installed; pip install -r requirements.txt\n"
    )


def test_import_changes_nothing_in_the_process(bare_python):
    code = (
        "import os, signal, sys, threading, yaml, argparse\n"
        "def state(): return (dict(os.environ), [signal.getsignal(n) for n in (1, 2, 15)],\n"
        "                     os.getcwd(),\n"
        "                     sys.path[:], threading.active_count(), sorted(os.listdir()))\n"
        "before = state(); import train_qwen3_ft; assert state() == before"
    )
    done = bare_python(code)
    assert (done.returncode, done.stderr) == (0, "")


def test_without_the_packages_the_launcher_names_them(bare_python, write_config):
    done = bare_python(
        f"import train_qwen3_ft; raise SystemExit(train_qwen3_ft.main([{str(write_config())!r}]))"
    )
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    says(
        done.stderr,
        r"torch, transformers, llamafactory.*not installed.*pip install -r requirements\.txt",
    )


def test_dry_run_imports_nothing_heavy(clean_env, write_config, tmp_path):
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); import train_qwen3_ft as t\n"
        f"assert t.main([{str(write_config())!r}, '--dry-run']) == 0\n"
        "heavy = {'torch', 'transformers', 'llamafactory', 'deepspeed', 'swanlab', 'numpy'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=clean_env,
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.stdout.endswith("[]\n"), done.stderr


def test_load_config_raises_the_error_that_main_shows(tmp_path):
    with pytest.raises(ft.LaunchError, match=r"nowhere\.yaml"):
        ft.load_config(tmp_path / "nowhere.yaml", {})


def test_a_key_that_no_table_names_is_an_error_and_not_none():
    values = ft.Values(learning_rate=1.0)
    assert (values.learning_rate, values.hang_timeout, values.fsdp) == (1.0, 600, None)
    with pytest.raises(AttributeError, match="hang_timeuot"):
        _ = values.hang_timeuot
