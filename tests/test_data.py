"""The data as the model sees it: data.json, --preview, the template check, what serves the model.

The figures are exact, on files with known lengths and known faults.
"""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import psutil
import pyarrow
import pyarrow.parquet
import pytest
from tokenizers import Tokenizer

import train_qwen3_ft as ft
from helpers import HELPERS
from helpers import config as configs
from helpers.config import CONFIGS, TINY_MODEL, write_json
from helpers.launcher import Run, ask_python, run, train, until
from helpers.real import real_fixture

MODEL = CONFIGS / "demo_model"
COLUMNS = {"prompt": "instruction", "query": "input", "response": "output"}
WORD = " WHERE"  # one token of the demo tokenizer; so is "objects"


def count(*texts):
    """Tokens of texts that are encoded one by one, as LLaMA-Factory does."""
    tokenizer = Tokenizer.from_file(str(MODEL / "tokenizer.json"))
    return sum(len(tokenizer.encode(text, add_special_tokens=False).ids) for text in texts)


def asked(prompt):
    return count(
        f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n",
        "<think>\n\n</think>\n\n",
    )


def answered(answer):
    return count(f"{answer}<|im_end|>\n")


ASKED, ANSWERED = asked(""), answered("")  # without any text


def prompt_of(tokens):
    """A prompt that is exactly so many tokens with the template around it."""
    return "objects" + WORD * (tokens - ASKED - 1)


def answer_of(tokens):
    return WORD * (tokens - ANSWERED)


def pair(prompt_tokens, answer_tokens):
    return {
        "instruction": prompt_of(prompt_tokens),
        "input": "",
        "output": answer_of(answer_tokens),
    }


def said(*turns):
    return {"conversations": [{"from": who, "value": text} for who, text in turns]}


def two_turns(a, b, c, d):
    return said(
        ("human", prompt_of(a)),
        ("gpt", answer_of(b)),
        ("human", prompt_of(c)),
        ("gpt", answer_of(d)),
    )


def test_the_files_have_the_lengths_that_their_code_says():
    assert [asked(prompt_of(tokens)) for tokens in (14, 20, 140)] == [14, 20, 140]
    assert [answered(answer_of(tokens)) for tokens in (6, 10, 80)] == [6, 10, 80]


FAULTS = [
    pair(20, 10),  # 30
    pair(40, 24),  # 64: exactly cutoff_len, not cut
    pair(50, 24),  # 74: the end of the prompt is cut
    pair(30, 80),  # 110: the answer is cut
    pair(70, 70),  # 140: both
    {"instruction": prompt_of(20), "input": "", "output": ""},  # the end token alone is learned
    {"instruction": prompt_of(20), "input": "", "output": None},  # no answer: dropped
]
SHAREGPT_FAULTS = [
    said(("human", prompt_of(20)), ("gpt", answer_of(10))),  # 30
    said(("human", prompt_of(20)), ("bot", answer_of(10))),  # wrong role: dropped
    said(("system", "You write SQL.")),  # only system text: dropped
    said(("human", prompt_of(20))),  # no answer: dropped
    two_turns(20, 10, 20, 10),  # 60
    two_turns(40, 24, 20, 10),  # 94: the second turn falls away, the first fits exactly
    two_turns(30, 10, 30, 10),  # 80: the second prompt is cut
]
FILES = {
    "pairs.json": FAULTS,
    "pairs.jsonl": FAULTS,
    "pairs.csv": FAULTS,
    "pairs.parquet": FAULTS,
    "talks.json": SHAREGPT_FAULTS,
    "objects.json": [{"instruction": "a", "input": "", "output": {"sql": "SELECT 1"}}] * 3,
    "mixed.jsonl": [
        pair(20, 10),
        {"instruction": "a", "input": "", "output": {"sql": "SELECT 1"}},
    ],
    "system.json": [said(("system", "You write SQL."))] * 3,
    "unlearned.json": [pair(140, 8), pair(20, 6)],
    "long.json": [pair(20 + n % 7, 10 + n % 5) for n in range(2500)],
}


def write(path, rows):
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif path.suffix == ".csv":
        with open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".jsonl":
        path.write_text("\n".join(map(json.dumps, rows)))
    else:
        path.write_text(json.dumps(rows))


CASES = {
    "json": {"dataset": "pairs.json"},
    "jsonl": {"dataset": "pairs.jsonl"},
    "csv": {"dataset": "pairs.csv"},
    "parquet": {"dataset": "pairs.parquet"},
    "workers": {"dataset": "pairs.json", "preprocessing_num_workers": 2},
    "cached": {"dataset": "pairs.json"},
    "sharegpt": {"dataset": "talks.json"},
    "batch of faults": {"dataset": "talks.json", "preprocessing_batch_size": 1},
    "last turn only": {"dataset": "talks.json", "mask_history": True},
    "objects": {"dataset": "objects.json"},
    "mixed": {"dataset": "mixed.jsonl"},
    "system": {"dataset": "system.json"},
    "unlearned": {"dataset": "unlearned.json", "cutoff_len": 16},
    "one unlearned": {"dataset": "unlearned.json", "cutoff_len": 16, "max_samples": 1},
    "packed": {"dataset": "long.json", "packing": True, "cutoff_len": 128},
    "streamed": {
        "dataset": "long.json",
        "streaming": True,
        "max_steps": 1,
        "dataloader_num_workers": 1,
    },
    "two sets": {
        "dataset": "pairs.json,talks.json",
        "eval_dataset": "long.json",
        "max_samples": 7,
    },
    "llama3": {"dataset": "pairs.json", "template": "llama3"},
    "chatml": {"dataset": "pairs.json", "template": "chatml"},
    "alpaca": {"dataset": "pairs.json", "template": "alpaca"},
    "qwen": {"dataset": "pairs.json", "template": "qwen"},
    "thinking": {"dataset": "pairs.json", "enable_thinking": True},
    "nothink": {"dataset": "pairs.json", "template": "qwen3_nothink"},
}


@real_fixture
def measured(tmp_path_factory):
    """{name of a case: what measure_cases.py says of it}, all from one process."""
    folder = tmp_path_factory.mktemp("data")
    info = {}
    for name, rows in FILES.items():
        write(folder / name, rows)
        info[name] = {"file_name": name, "columns": COLUMNS}
        if "conversations" in rows[0]:
            info[name] = {
                "file_name": name,
                "formatting": "sharegpt",
                "columns": {"messages": "conversations"},
            }
    (folder / "dataset_info.json").write_text(json.dumps(info))
    common = {
        "stage": "sft",
        "do_train": True,
        "use_cpu": True,
        "report_to": "none",
        "finetuning_type": "full",
        "model_name_or_path": str(MODEL),
        "template": "qwen3",
        "enable_thinking": False,
        "cutoff_len": 64,
        "dataset_dir": str(folder),
        "output_dir": str(folder / "out"),
        "per_device_train_batch_size": 2,
        "train_sampling_strategy": "sequential",
    }
    (folder / "cases.json").write_text(json.dumps([common | case for case in CASES.values()]))
    env = {
        **os.environ,
        "HF_HOME": str(folder / "hf"),
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
    }
    command = [sys.executable, str(HELPERS / "measure_data.py"), str(folder / "cases.json")]
    answer = subprocess.run(command, capture_output=True, text=True, env=env, cwd=folder)
    assert answer.returncode == 0, answer.stderr
    return dict(zip(CASES, json.loads(answer.stdout), strict=True))


def only(answer):
    assert "error" not in answer, answer["error"]
    (figures,) = answer["figures"]
    return figures


@pytest.mark.parametrize("case", ["json", "jsonl", "parquet", "workers", "cached"])
def test_every_figure_of_alpaca_data_is_exact(measured, case):
    figures = only(measured[case])
    empty = 20 + ANSWERED
    assert (figures["rows"], figures["kept"], figures["dropped"]) == (7, 6, 1)
    assert figures["cut"] == 3
    assert figures["unlearned"] == 0
    assert figures["unended"] == 2  # the long answer and both
    lengths = [30, 64, 64, 64, 64, empty]
    assert figures["tokens"] == {
        "min": empty,
        "median": 64,
        "p99": 64,
        "max": 64,
        "all": sum(lengths),
    }
    drawn = 2 * 64 + 2 * 64 + 2 * 64  # batches of two, padded to a multiple of eight
    assert figures["padding"] == pytest.approx(1 - sum(lengths) / drawn)
    assert figures["enough"] == [192, 0]


def test_tokenized_data_comes_from_the_cache(measured):
    assert "Running tokenizer on dataset" in measured["json"]["log"]
    assert "Running tokenizer on dataset" not in measured["cached"]["log"]


def test_an_empty_cell_of_csv_is_no_answer(measured):
    figures = only(measured["csv"])
    assert (figures["rows"], figures["kept"], figures["dropped"]) == (7, 5, 2)
    assert (figures["cut"], figures["unended"]) == (3, 2)
    assert figures["tokens"]["all"] == 30 + 4 * 64


@pytest.mark.parametrize("case", ["sharegpt", "batch of faults"])
def test_every_figure_of_sharegpt_data_is_exact(measured, case):
    figures = only(measured[case])
    assert (figures["rows"], figures["kept"], figures["dropped"]) == (7, 4, 3)
    assert figures["cut"] == 2  # one lost its second turn whole
    assert figures["unended"] == 0  # both still end with an end
    assert figures["tokens"] == {
        "min": 30,
        "median": 64,
        "p99": 64,
        "max": 64,
        "all": 30 + 60 + 64 + 64,
    }


def test_with_mask_history_the_first_turn_is_cut(measured):
    figures = only(measured["last turn only"])
    assert (figures["kept"], figures["cut"], figures["unended"], figures["tokens"]["max"]) == (
        4,
        2,
        0,
        64,
    )


@pytest.mark.parametrize("case", ["objects", "system"])
def test_data_without_any_answer_stops_before_a_model(measured, case):
    assert "Cannot find valid samples" in measured[case]["error"]
    assert measured[case]["figures"] == []
    assert "Dropped invalid example" in measured[case]["log"]


def test_samples_whose_labels_are_all_masked_are_counted(measured):
    assert only(measured["unlearned"])["unlearned"] == 1
    assert measured["unlearned"]["problem"] == ""
    assert measured["one unlearned"]["problem"].startswith("nothing to learn from")


def test_packed_samples_are_counted_one_by_one(measured):
    figures, lengths = only(measured["packed"]), [30 + n % 7 + n % 5 for n in range(2500)]
    assert (figures["kept"], figures["cut"], figures["tokens"]["all"]) == (
        2500,
        0,
        sum(lengths),
    )
    assert figures["tokens"]["max"] == 40
    assert 0 < figures["padding"] < 0.3
    assert figures["padding"] == pytest.approx(
        1 - sum(lengths) / 128 / round(sum(lengths) / 128 / (1 - figures["padding"]))
    )


def test_streamed_data_is_measured_by_the_first_rows_that_are_drawn(measured):
    figures, lengths = (
        only(measured["streamed"]),
        sorted(30 + n % 7 + n % 5 for n in range(2500)),
    )
    assert (figures["rows"], figures["kept"], figures["cut"]) == (1000, 1000, 0)
    assert sum(lengths[:1000]) < figures["tokens"]["all"] < sum(lengths[-1000:])


def test_evaluation_data_has_figures_of_its_own(measured):
    train, evaluation = measured["two sets"]["figures"]
    assert (train["rows"], train["kept"]) == (14, 10)
    assert (evaluation["rows"], evaluation["kept"], evaluation["tokens"]["min"]) == (7, 7, 30)


def test_the_trainer_sees_no_column_more(measured):
    plain = ["attention_mask", "audios", "images", "input_ids", "labels", "videos"]
    assert (
        measured["json"]["columns"]
        == measured["workers"]["columns"]
        == measured["streamed"]["columns"]
        == plain
    )


@pytest.mark.parametrize("case", ["json", "thinking", "nothink", "chatml", "alpaca"])
def test_a_template_that_serves_as_it_trains(measured, case):
    assert only(measured[case])["template"] == ""


@pytest.mark.parametrize("case", ["llama3", "qwen"])
def test_a_template_that_differs_says_where(measured, case):
    print(only(measured[case])["template"])
    assert only(measured[case])["template"].startswith(
        "differs from the tokenizer's chat template at token "
    )


def test_tokens_beyond_the_embedding_are_named(measured):
    problem = measured["llama3"]["problem"]
    assert "the model embeds 960 only; set resize_vocab: true" in problem
    assert measured["json"]["problem"] == ""


def test_a_sample_is_shown_with_what_is_learned_between_marks(measured):
    text = measured["json"]["marked"]
    assert (
        text.startswith("<|im_start|>user\n")
        and "</think>\n\n[[" in text
        and text.endswith("<|im_end|>\n]]")
    )
    assert "[[<think>" in measured["thinking"]["marked"]  # the empty thought is learned


def lines_of(case, folder):
    (folder / "logs").mkdir()
    (folder / "logs" / "rank0.log").write_text(case["log"])
    return ft.data_lines(only(case), ft.Run(folder))


def test_the_line_and_the_warnings(measured, tmp_path):
    figures, empty = only(measured["json"]), 20 + ANSWERED
    lines = lines_of(measured["json"], tmp_path)
    assert lines["data"] == (
        f"6 of 7 rows, {empty}-64 tokens (median 64, 99 %: 64), 3 cut at 64, 1 dropped, "
        f"{100 * figures['padding']:.0f} % padding"
    )
    assert lines["dropped"].startswith(
        "1 row; the first: Dropped invalid example: [{'role': 'user'"
    )
    assert lines["cut"] == "3 samples; cutoff_len=192 would cut none"
    assert lines["unended"] == "2 answers lost the end token: the model learns not to stop"


def test_the_first_reason_of_dropped_rows_is_told(measured, tmp_path):
    lines = lines_of(measured["sharegpt"], tmp_path)
    assert lines["dropped"].startswith(
        "3 rows; the first: Invalid role tag in [{'from': 'human'"
    )
    assert lines["cut"].startswith("2 samples")


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({}, "saves/x --reasoning-parser qwen3"),
        (
            {"enable_thinking": False},
            "saves/x --default-chat-template-kwargs '{\"enable_thinking\": false}'",
        ),
        ({"template": "llama3"}, "saves/x"),
        (
            {
                "finetuning_type": "lora",
                "model_name_or_path": "Qwen/Qwen3-14B",
                "template": "qwen3_nothink",
            },
            "Qwen/Qwen3-14B --enable-lora --lora-modules x=saves/x",
        ),
    ],
)
def test_what_serves_the_model(values, words):
    given = ft.Values({"template": "qwen3", "finetuning_type": "full"} | values)
    assert ft.model_commands(Path("saves/x"), given)["serve"] == f"vllm serve {words}"


def test_what_the_model_can_embed_is_looked_up_where_the_model_was_downloaded(tmp_path):
    snapshot = tmp_path / "models--someone--some-model" / "snapshots" / "abc"
    write_json(snapshot / "config.json", TINY_MODEL)
    values = ft.Values(
        model_name_or_path="someone/some-model", model_revision="abc", cache_dir=str(tmp_path)
    )
    tokenizer = SimpleNamespace(convert_ids_to_tokens="token {}".format)
    figures = {"unlearned": 0, "kept": 1}
    problems = [
        ft.data_problem(figures, [{"input_ids": [1, token]}], tokenizer, values)
        for token in (767, 768)
    ]
    assert problems[0] == "" and "the model embeds 768 only" in problems[1]


def test_objects_among_the_answers_are_an_error_of_the_loader(measured):
    assert "error" in measured["mixed"]
    assert "Column(/output) changed from string to object in row 1" in measured["mixed"]["log"]


def test_rank_0_writes_the_figures_and_a_modelfile(measured):
    assert json.loads(measured["json"]["data.json"]) == only(measured["json"])
    user = "<|im_start|>user\n{{ .Content }}<|im_end|>\n<|im_start|>assistant\n"
    answer = '{{ else if eq .Role "assistant" }}{{ .Content }}<|im_end|>\n'
    assert user + "<think>\n\n</think>\n\n" + answer in measured["json"]["Modelfile"]
    assert user + answer in measured["thinking"]["Modelfile"]
    assert 'PARAMETER stop "<|im_end|>"' in measured["json"]["Modelfile"]


def test_without_anything_to_learn_the_rank_ends_and_says_why(measured):
    assert (
        json.loads(measured["one unlearned"]["data.json"])["problem"]
        == measured["one unlearned"]["problem"]
    )


# --- what the user sees


def plan(here, config, **options):
    return here(config, "--dry-run", **options).stdout


def test_the_plan_says_that_an_empty_thought_is_learned(write_config, here):
    said = plan(here, write_config())
    assert "thinking    template qwen3 puts an empty <think></think> before each answer" in said


@pytest.mark.parametrize("values", [{"enable_thinking": False}, {"template": "llama3"}])
def test_the_plan_is_silent_where_none_is_learned(write_config, here, values):
    assert "thinking " not in plan(here, write_config(**values))


def test_the_plan_is_silent_where_the_data_thinks(write_config, here, tmp_path):
    config = write_config()
    row = {"instruction": "a", "input": "", "output": "<think>hm</think>SELECT 1;"}
    write_json(tmp_path / "data" / "tiny.json", [row] * 20)
    assert "thinking " not in plan(here, config)


@pytest.mark.real
def test_the_figures_are_shown_before_the_first_step_and_advise_the_next_run(tmp_path):
    rows = [pair(20, 10), *[pair(20, 170)] * 3] * 3
    write_json(tmp_path / "data" / "rows.json", rows)
    write_json(tmp_path / "data" / "dataset_info.json", {"rows": {"file_name": "rows.json"}})
    config = configs.write_config(
        tmp_path,
        deepspeed=None,
        per_device_train_batch_size=4,
        dataset="rows",
        dataset_dir=str(tmp_path / "data"),
        enable_thinking=False,
    )
    done = train(tmp_path, config, ranks=1)
    first, _, rest = done.console.partition("\ndata ")
    assert "12 of 12 rows, 30-190 tokens (median 190" in rest.splitlines()[0]
    assert "step 1/3" in rest and "step 1/3" not in first
    assert json.loads((done.run_dir / "data.json").read_text())["kept"] == 12
    assert (done.run_dir / "Modelfile").exists()
    assert f"serve       vllm serve {done.run_dir} --default-chat" in done.console


@pytest.mark.real
def test_data_without_anything_to_learn_ends_before_the_model_is_loaded(tmp_path):
    write_json(tmp_path / "data" / "rows.json", [pair(140, 8)])
    write_json(tmp_path / "data" / "dataset_info.json", {"rows": {"file_name": "rows.json"}})
    config = configs.write_config(
        tmp_path,
        deepspeed=None,
        dataset="rows",
        dataset_dir=str(tmp_path / "data"),
        cutoff_len=16,
        enable_thinking=False,
    )
    done = run(tmp_path, config)
    assert done.process.returncode == 2, done.console
    assert "nothing to learn from: cutoff_len=16 leaves no answer" in done.console
    assert "restart" not in done.console and "Traceback" not in done.console
    assert "Loading" not in (done.run_dir / "logs" / "rank0.log").read_text().split("model")[0]


def preview(folder: Path, *arguments: object, **options: object) -> Run:
    return run(folder, "--preview", *arguments, ranks=None, cwd=folder, **options)


@pytest.mark.real
def test_a_preview_shows_what_is_learned_between_brackets_and_the_figures(tmp_path):
    done = preview(
        tmp_path, "1", CONFIGS / "demo_cpu.yaml", "val_size=0.1", "eval_dataset=null"
    )
    assert done.process.returncode == 0, done.console
    assert (
        done.console.count("training sample: ")
        == done.console.count("evaluation sample: ")
        == 1
    )
    assert "</think>\n\n[[" in done.console and "<|im_end|>\n]]" in done.console
    assert "data        1408 of 1408 rows, 4" in done.console
    assert "template    the same as the tokenizer's chat template" in done.console
    assert [path.name for path in (tmp_path / "saves" / "demo_cpu").iterdir()] == ["data.json"]


def test_a_plan_after_a_preview_knows_the_longest_sample(shown, plan_of):
    words = (
        f"model_name_or_path={MODEL}",
        "max_samples=50",
        f"output_dir={shown.folder}/saves",
    )
    plan = plan_of(*words, f"output_dir={shown.folder}/saves/qwen3_14b_ft")
    assert 64 <= plan["longest_sample"] <= 120


@real_fixture
def shown(tmp_path_factory) -> Run:
    """A preview of the default configuration in a terminal, with the demo model for its own."""
    model, data = f"model_name_or_path={MODEL}", "max_samples=50"
    folder = tmp_path_factory.mktemp("shown")
    return preview(folder, CONFIGS / "qwen3_14b_ft.yaml", model, data, terminal=True)


def test_a_preview_needs_neither_gpus_nor_weights(shown):
    assert shown.process.returncode == 0, shown.console
    assert "data        50 of 50 rows" in shown.console


@pytest.mark.real
def test_a_preview_that_is_killed_leaves_nothing_behind(tmp_path):
    config = CONFIGS / "demo_cpu.yaml"
    with Run(tmp_path, "--preview", "1", config, ranks=None, cwd=tmp_path) as alive:
        begun = psutil.Process(alive.process.pid)
        sizes = lambda: [one.memory_info().rss for one in begun.children()]  # noqa: E731
        until(lambda: max(sizes(), default=0) > 300 << 20, "its imports")
        alive.process.kill()
        assert alive.left_after() == []


def test_a_preview_in_a_terminal_shows_what_is_learned_in_colour(shown):
    assert shown.console.count("\033[32mSELECT") == 2 and "[[" not in shown.console


@pytest.mark.real
def test_a_preview_names_tokens_that_the_model_cannot_embed(tmp_path):
    done = preview(tmp_path, "1", CONFIGS / "demo_cpu.yaml", "template=llama3")
    assert "the model embeds 960 only; set resize_vocab: true" in done.console
    assert "template    differs from the tokenizer's chat template" in done.console


@pytest.mark.real
def test_after_a_preview_of_pairs_the_plan_counts_the_longer_answer(tmp_path, plan_of):
    pairs = {
        "instruction": prompt_of(20),
        "input": "",
        "chosen": "a",
        "rejected": answer_of(80),
    }
    columns = COLUMNS | {"response": None, "chosen": "chosen", "rejected": "rejected"}
    entry = {"file_name": "rows.json", "ranking": True}
    entry["columns"] = {role: name for role, name in columns.items() if name}
    write_json(tmp_path / "data" / "rows.json", [pairs] * 4)
    write_json(tmp_path / "data" / "dataset_info.json", {"rows": entry})
    keys = {"dataset": "rows", "dataset_dir": str(tmp_path / "data"), "enable_thinking": False}
    config = configs.write_config(tmp_path, stage="dpo", **keys)
    done = preview(tmp_path, "1", config)
    assert done.process.returncode == 0, done.console
    assert plan_of(config)["longest_sample"] == 104  # 20 + 80, in eights


@pytest.mark.real
def test_a_preview_of_data_that_cannot_be_read_says_why(tmp_path):
    done = preview(tmp_path, CONFIGS / "demo_cpu.yaml", "dataset=missing")
    assert done.process.returncode == 2
    assert "missing is not in" in done.console and "Traceback" not in done.console


@pytest.mark.real
def test_a_preview_without_the_tokenizer_says_why(tmp_path):
    env = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hub")}
    done = preview(tmp_path, CONFIGS / "qwen3_14b_ft.yaml", "max_samples=50", env=env)
    assert done.process.returncode == 2
    assert "error: " in done.console and "Failed to load tokenizer" not in done.console
    assert "Qwen/Qwen3-14B" in done.console or "cached" in done.console, done.console


@pytest.mark.real
def test_figures_are_those_of_rank_0_and_their_padding_that_of_100_000_samples():
    """Four million lengths take half a minute to sort, in every rank."""
    code = """
import os
from types import SimpleNamespace
from datasets import Dataset
from llamafactory.data import loader
import train_qwen3_ft as ft

rows = Dataset.from_dict({"input_ids": [[1]], "measured": [[1]], "lost": [0]})
loader._get_preprocessed_dataset = lambda *args, is_eval: rows
told, sizes = [], []
ft.measure_data(ft.Values(), lambda *args: told.append(args))
os.environ["RANK"] = "1"
options = SimpleNamespace(streaming=False)
left = loader._get_preprocessed_dataset(rows, options, None, "sft", None, None, is_eval=False)

count = 250_000
ids = [[1] * 5] * count
lengths = Dataset.from_dict({"input_ids": ids, "measured": [[5]] * count, "lost": [0] * count})
ft.drawn_tokens = lambda lengths, *args: sizes.append(len(lengths)) or 5 * len(lengths)
figures = ft.data_figures(
    lengths, count, SimpleNamespace(cutoff_len=8, packing=False),
    SimpleNamespace(train_sampling_strategy="group_by_length"), ft.Values(),
)
result = [told, left.column_names, sizes, figures["tokens"]["all"], figures["padding"]]
"""
    told, columns, sizes, tokens, padding = ask_python(code, None)
    assert (told, columns) == ([], ["input_ids"])
    assert max(sizes) <= 100_000 and (tokens, padding) == (1_250_000, 0)
