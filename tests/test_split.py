"""How a step is split into micro-batches: by the lengths of the samples, the memory and the links."""

import json
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pyarrow
import pytest

from helpers.config import write_json
from helpers.launcher import fake_gpus, says
from helpers.plan import bare_plan
from train_qwen3_ft import (
    Config,
    Devices,
    Gpu,
    Plan,
    Problems,
    Run,
    Values,
    Zero,
    choose_split,
    data_key,
    gather_cost,
    open_split,
    padded_length,
    preflight,
    qwen3_config,
    splits,
    write_figures,
)

KEY = "per_device_train_batch_size"
ZERO3 = Zero(3, used=True)
SHORT = [[48, 10], [64, 20], [120, 5]]
LONG_TAIL = [[56, 400], [120, 300], [248, 200], [504, 100], [1000, 60], [2000, 40]]
GROUPED = {"train_sampling_strategy": "group_by_length"}


def gpus(count: int, linked: bool) -> list[Gpu]:
    everyone = frozenset(range(count)) if linked else frozenset()
    return [Gpu(n, "", "", 80 << 30, 0, (), (9, 0), 13000, everyone) for n in range(count)]


def plan_for(
    lengths: list,
    samples: int = 16,
    ranks: int = 4,
    linked: bool = True,
    zero: Zero = ZERO3,
    **more,
) -> Plan:
    """A plan of 0.6B on GPUs of 80 GB, with samples of these lengths, one at a time."""
    sizes = {KEY: 1, "gradient_accumulation_steps": samples, "cutoff_len": 2048}
    plan = bare_plan(qwen3_config("Qwen/Qwen3-0.6B"), zero, ranks, 80 << 30, **sizes, **more)
    devices = Devices(tuple(map(str, range(ranks))), "", ranks)
    figures = {"lengths": lengths, "source": "data.json"} if lengths else {}
    return replace(plan, devices=devices, gpus=gpus(ranks, linked), figures=figures)


def chosen(plan: Plan) -> int:
    return choose_split(plan).micro


# --- the pure functions


def test_two_samples_drawn_at_random_are_padded_to_the_longer_one():
    plan = plan_for([[8, 1], [16, 1]], zero=Zero(2, used=True))
    pairs = replace(plan, values=Values(plan.values, per_device_train_batch_size=2))
    assert padded_length(plan) == 12
    assert padded_length(pairs) == (8 + 16 + 16 + 16) / 4


def drawn(order: list[int], micro: int) -> float:
    """The mean of what the samples are padded to in micro-batches of this order."""
    batches = [order[at : at + micro] for at in range(0, len(order), micro)]
    return sum(max(batch) * len(batch) for batch in batches) / len(order)


@pytest.mark.parametrize("micro", [1, 2, 4, 16])
@pytest.mark.parametrize("order", ["random", "group_by_length"])
def test_the_padding_is_that_of_batches_drawn_one_by_one(micro: int, order: str):
    samples = [tokens for tokens, count in LONG_TAIL for _ in range(count * 16)]
    random.Random(0).shuffle(samples)
    if order == "group_by_length":  # 50 steps of 16, as transformers sorts them
        groups = [samples[at : at + 800] for at in range(0, len(samples), 800)]
        samples = [tokens for group in groups for tokens in sorted(group, reverse=True)]
    lengths = sorted(map(list, Counter(samples).items()))
    plan = plan_for(lengths, zero=Zero(2, used=True), train_sampling_strategy=order)
    plan = replace(plan, values=Values(plan.values, per_device_train_batch_size=micro))
    plan = replace(plan, values=Values(plan.values, gradient_accumulation_steps=16 // micro))
    assert padded_length(plan) == pytest.approx(drawn(samples, micro), rel=0.03)


@pytest.mark.parametrize(
    ("plan", "smallest", "largest"),
    [
        pytest.param(plan_for(SHORT), 16, 16, id="short-samples"),
        pytest.param(plan_for(LONG_TAIL), 1, 4, id="long-tailed"),
        pytest.param(plan_for(LONG_TAIL, linked=False), 16, 16, id="long-tailed-over-pcie"),
        pytest.param(plan_for(LONG_TAIL, **GROUPED), 8, 16, id="grouped-by-length"),
        pytest.param(plan_for(LONG_TAIL, zero=Zero(2, used=True)), 1, 1, id="zero-2"),
        pytest.param(plan_for(SHORT, samples=12), 12, 12, id="no-power-of-two"),
        pytest.param(plan_for([]), 16, 16, id="lengths-that-are-unknown"),
    ],
)
def test_the_split_with_the_least_work_is_chosen(plan: Plan, smallest: int, largest: int):
    assert smallest <= chosen(plan) <= largest


def test_what_does_not_fit_in_nine_tenths_of_the_gpu_is_not_chosen():
    plan = plan_for([])
    needed = {other.micro: other.needed for other in splits(plan)}
    room = int(needed[8] / 0.9) + 1
    assert chosen(replace(plan, device_bytes=room)) == 8
    assert chosen(replace(plan, device_bytes=room - 2)) == 4
    assert chosen(replace(plan, device_bytes=1)) == 1


@pytest.mark.parametrize(
    ("plan", "tokens"),
    [
        pytest.param(plan_for(SHORT), 1_100, id="nvlink"),
        pytest.param(plan_for(SHORT, linked=False), 11_000, id="pcie"),
        pytest.param(replace(plan_for(SHORT), world_size=8), 11_000, id="two-nodes"),
        pytest.param(
            plan_for(SHORT, zero=Zero(3, True, True, used=True)), 11_000, id="offloaded"
        ),
        pytest.param(plan_for(SHORT, ranks=1), 150, id="one-gpu"),
        pytest.param(plan_for(SHORT, zero=Zero(2, used=True)), 150, id="zero-2"),
        pytest.param(
            replace(plan_for(SHORT), gpus=[], devices=Devices((), "", 4)), 600, id="cpu"
        ),
        pytest.param(replace(plan_for(SHORT), gpus=[]), 11_000, id="unknown-gpus"),
    ],
)
def test_what_a_micro_batch_costs_besides_its_tokens(plan: Plan, tokens: int):
    assert gather_cost(plan) == tokens


# --- the plan counts the longest sample


@pytest.fixture
def measured(here: Callable[..., SimpleNamespace], tmp_path: Path) -> Callable[..., dict]:
    """measured(*words, lengths=..., gpus=...): an earlier run under tmp_path/out has found samples of
    these lengths in the data of this plan, which is returned.
    """

    def write(
        *words: object, lengths: list = SHORT, gpus: list | None = None, **more: int
    ) -> dict:
        plan = json.loads(here(*words, "--dry-run", "--json", gpus=gpus).stdout)
        figures = {"key": plan["data_key"], "lengths": lengths, **more}
        write_json(tmp_path / "out" / "earlier" / "data.json", figures)
        return plan

    return write


def test_the_plan_counts_the_longest_sample_where_an_earlier_run_has_measured_it(
    write_config, measured, plan_of, here, tmp_path: Path
):
    before = measured(write_config())
    after = plan_of(write_config())
    assert (before["longest_sample"], after["longest_sample"]) == (64, 120)
    write_json(tmp_path / "out" / "earlier" / "data.json", {})
    assert plan_of(write_config())["longest_sample"] == 64


def test_the_plan_says_by_what_it_counts(write_config, measured, here, tmp_path: Path):
    config = write_config()
    says(here(config, "--dry-run").stdout, "^longest +64 tokens are planned.*: cutoff_len$")
    measured(config)
    where = tmp_path / "out" / "earlier" / "data.json"
    says(here(config, "--dry-run").stdout, f"^longest +120 tokens in a sample, by {where}$")


OTHER_SAMPLES = [
    {"cutoff_len": 128},
    {"template": "qwen3_nothink"},
    {"enable_thinking": False},
    {"train_on_prompt": True},
    {"mask_history": True},
    {"max_samples": 10},
    {"val_size": 4},
    {"default_system": "You write SQL."},
    {"eval_dataset": "tiny"},
    {"split_special_tokens": True},
]


@pytest.mark.parametrize("keys", OTHER_SAMPLES, ids=lambda keys: next(iter(keys)))
def test_another_value_of_what_is_tokenized_makes_other_samples(
    write_config, measured, plan_of, keys: dict
):
    measured(write_config())
    cutoff = keys.get("cutoff_len", 64)
    assert plan_of(write_config(**keys))["longest_sample"] == cutoff


@pytest.mark.parametrize("name", ["data/tiny.json", "model/tokenizer.json"])
def test_another_file_of_what_is_tokenized_makes_other_samples(
    write_config, measured, plan_of, tmp_path: Path, name: str
):
    config = write_config()
    measured(config)
    write_json(tmp_path / name, [{"instruction": "a", "input": "", "output": "b"}])
    assert plan_of(config)["longest_sample"] == 64


@pytest.mark.parametrize(
    "keys",
    [
        {"learning_rate": 1e-5},
        {KEY: 1},
        {"seed": 42},
        {"max_samples": 20},  # there are no more
        {"preprocessing_num_workers": 2},
    ],
    ids=lambda keys: next(iter(keys)),
)
def test_what_is_not_tokenized_may_change(write_config, measured, plan_of, keys: dict):
    measured(write_config(seed=42))
    assert plan_of(write_config(**{"seed": 42, **keys}))["longest_sample"] == 120


@pytest.mark.parametrize(
    "keys", [{"packing": True}, {"streaming": True, "max_steps": 5}], ids=["packed", "streamed"]
)
def test_packed_and_streamed_samples_count_as_cutoff_len(
    write_config, measured, plan_of, keys: dict
):
    measured(write_config(**keys))
    assert plan_of(write_config(**keys))["longest_sample"] == 64


def test_a_preview_of_all_rows_measures_for_the_run_too(
    write_config, here, plan_of, tmp_path: Path
):
    """Which leaves out what the model needs, and limits the rows."""
    config = write_config(bf16=True)
    args = SimpleNamespace(config=config, overrides={}, preview="2", score=None, force=False)
    found = preflight(args, {}, None)
    assert data_key(found.plan) == plan_of(config)["data_key"]


def test_evaluation_batches_count_the_longest_sample_that_is_evaluated(
    write_config, measured, plan_of
):
    keys = {"val_size": 4, "eval_strategy": "epoch", "per_device_eval_batch_size": 64}
    unknown = plan_of(write_config(**keys))["memory_per_gpu"]["logits"]
    measured(write_config(**keys), lengths=[[8, 16]], evaluated=32)
    assert plan_of(write_config(**keys))["memory_per_gpu"]["logits"] == unknown // 2


def test_the_longest_evaluated_sample_is_added_to_the_figures_of_training(tmp_path: Path):
    run = Run(tmp_path)
    write_figures(run, {"lengths": [[8, 1]]}, is_eval=True)
    assert run.read("data.json") == {}  # without those the console has nothing to show
    write_figures(run, {"lengths": [[8, 1]]}, is_eval=False)
    for longest in (24, 16):
        write_figures(run, {"lengths": [[longest, 1]]}, is_eval=True)
    assert (run.read("data.json")["lengths"], run.read("data.json")["evaluated"]) == (
        [[8, 1]],
        24,
    )


def write_tokenized(folder: Path, **splits: list[list[int]]) -> None:
    """What save_to_disk leaves of samples, each of them a pair of sequences of these lengths."""
    for name, pairs in splits.items():
        columns = {
            f"{side}_input_ids": pyarrow.array([[1] * pair[at] for pair in pairs])
            for at, side in enumerate(("chosen", "rejected"))
        }
        table = pyarrow.table(columns)
        (folder / name).mkdir(parents=True)
        with pyarrow.OSFile(str(folder / name / "data-00000-of-00001.arrow"), "wb") as file:
            with pyarrow.ipc.new_stream(file, table.schema) as stream:
                stream.write_table(table)
        write_json(folder / name / "state.json", {})


def test_tokenized_data_is_measured_where_it_lies(write_config, plan_of, here, tmp_path: Path):
    folder = tmp_path / "tokenized"
    write_tokenized(folder, train=[[3, 9], [20, 30]], validation=[[40, 41]])
    config = write_config(tokenized_path=str(folder), cutoff_len=1024)
    assert plan_of(config)["longest_sample"] == 32
    says(here(config, "--dry-run").stdout, f"^longest +32 tokens in a sample, by {folder}$")


# --- auto


def test_the_default_configuration_on_four_gpus_of_80_gb(
    measured, here, plan_of, tmp_path: Path
):
    words = (f"output_dir={tmp_path}/out", f"{KEY}=auto", "global_batch_size=64")
    before = measured(*words, gpus=fake_gpus(4))
    after = plan_of(*words, gpus=fake_gpus(4))
    assert before["configuration"][KEY] == 2 and after["configuration"][KEY] == 16
    assert after["configuration"]["gradient_accumulation_steps"] == 1
    assert (after["global_batch_size"], after["total_steps"]) == (64, 48)
    shown = here(*words, "--dry-run", gpus=fake_gpus(4)).stdout
    says(
        shown,
        r"^batch +16 per device x 4 GPUs x 1 accumulation = 64 samples per step \(auto: longest "
        r"sample 120 tokens, padding 4\d %, 8 x fewer gathers than 2 x 8\)$",
    )
    says(
        shown,
        r"^longest +120 tokens .*; drawn at random: --rehearse trains on the longest first",
    )


@pytest.mark.parametrize(
    ("model", "room", "micro"), [("8B", 48, 16), ("4B", 48, 16), ("1.7B", 24, 16)]
)
def test_smaller_gpus_get_what_fits_with_the_lengths_of_the_samples(
    measured, plan_of, tmp_path: Path, model: str, room: int, micro: int
):
    words = (
        f"output_dir={tmp_path}/out",
        f"{KEY}=auto",
        "global_batch_size=64",
        f"model_name_or_path=Qwen/Qwen3-{model}",
    )
    measured(*words, gpus=fake_gpus(4, room))
    after = plan_of(*words, gpus=fake_gpus(4, room))
    assert after["configuration"][KEY] == micro
    assert sum(after["memory_per_gpu"].values()) <= 0.9 * room * 2**30


def test_where_not_even_one_sample_fits_it_is_said(measured, here, tmp_path: Path):
    words = (
        f"output_dir={tmp_path}/out",
        f"{KEY}=auto",
        "global_batch_size=64",
        "model_name_or_path=Qwen/Qwen3-4B",
    )
    measured(*words, gpus=fake_gpus(4, 24))
    done = here(*words, "--dry-run", gpus=fake_gpus(4, 24))
    says(
        done.stderr, "memory: 24.9 GiB is needed on each GPU, 24.0 GiB is there; it fits with "
    )
    says(done.stdout, "^batch +1 per device x 4 GPUs x 16 accumulation = 64 samples per step")


def test_the_steps_are_those_of_the_split_that_was_chosen(write_config, plan_of):
    keys = {KEY: "auto", "gradient_accumulation_steps": None, "global_batch_size": 8}
    plan = plan_of(write_config(**keys, dataloader_drop_last=True))
    assert plan["configuration"][KEY] == 8
    assert plan["steps_per_epoch"] == 2  # of 20 samples; one at a time they would be 3


def test_gpus_with_nvlink_between_them_pad_less(measured, plan_of, tmp_path: Path):
    words = (
        f"output_dir={tmp_path}/out",
        f"{KEY}=auto",
        "global_batch_size=64",
        "model_name_or_path=Qwen/Qwen3-0.6B",
    )
    pairs = [dict(gpu, nvlink=[n ^ 1]) for n, gpu in enumerate(fake_gpus(4))]
    linked = [dict(gpu, nvlink=[0, 1, 2, 3]) for gpu in fake_gpus(4)]
    measured(*words, lengths=LONG_TAIL, gpus=linked)
    sizes = [plan_of(*words, gpus=kind)["configuration"][KEY] for kind in (linked, pairs)]
    assert sizes[0] < sizes[1]


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        pytest.param(
            [], r"auto needs global_batch_size, the samples per", id="without-samples"
        ),
        pytest.param(
            ["global_batch_size=6"], "global_batch_size: 6 cannot be split", id="indivisible"
        ),
        pytest.param(
            ["global_batch_size=64", "finetuning_type=lora"],
            "auto cannot tell what fits",
            id="unknown-memory",
        ),
    ],
)
def test_auto_is_refused(here, tmp_path: Path, words: list, problem: str):
    words = [f"{KEY}=auto", "gradient_accumulation_steps=null", *words]
    done = here(*words, "--dry-run", gpus=fake_gpus(4))
    assert done.returncode == 2
    says(done.stderr, problem)


def test_unknown_lengths_are_said_and_refuse_nothing(here, write_config, plan_of):
    words = (f"{KEY}=auto", "global_batch_size=64", "cutoff_len=40000")
    done = here(*words, "--dry-run", gpus=fake_gpus(4))
    says(done.stdout, r"\(auto: by cutoff_len, and again once the data is tokenized\)$")
    assert "memory:" not in done.stderr


def run_of(folder: Path, **plan: object) -> Run:
    write_json(folder / "plan.json", plan)
    return Run(folder)


@pytest.mark.parametrize(
    ("recorded", "given", "is_open"),
    [
        pytest.param({"auto": True, "world_size": 2}, (), False, id="as-many-ranks"),
        pytest.param({"auto": True, "world_size": 4}, (), True, id="other-ranks"),
        pytest.param({"auto": False, "world_size": 4}, (), False, id="without-auto"),
        pytest.param({"auto": True, "world_size": 4}, (KEY,), False, id="given-now"),
    ],
)
def test_a_resume_chooses_again_only_on_another_number_of_ranks(
    tmp_path: Path, recorded: dict, given: tuple, is_open: bool
):
    config = Config("config.yaml", Values({KEY: 8}), overridden=frozenset(given))
    found, _, now_open = open_split(config, run_of(tmp_path, **recorded), 2, Problems())
    assert now_open is is_open
    assert found.values[KEY] == (1 if is_open else 8)


# --- what the plan advises for a split that was given


def test_the_plan_says_what_another_split_and_another_order_would_save(
    measured, here, tmp_path: Path
):
    words = (f"output_dir={tmp_path}/out", "model_name_or_path=Qwen/Qwen3-8B")
    measured(*words, lengths=LONG_TAIL, gpus=fake_gpus(4))
    line = says(here(*words, "--dry-run", gpus=fake_gpus(4)).stdout, "^faster .*")[0]
    first, second, *_ = line.split("; then ")
    says(first, r"is the same step, [\d.]+ x less work \(gathers 8 -> \d, .* padding \d+ % -> ")
    says(
        second, r"train_sampling_strategy=group_by_length is the same step, [\d.]+ x less work"
    )


def test_where_the_logits_leave_no_room_it_says_what_liger_would_free(here):
    line = says(here("--dry-run", gpus=fake_gpus(4)).stdout, "^faster .*")[0]
    says(line, r"enable_liger_kernel=true is the same step.* 3\.1 GiB freed\)")
