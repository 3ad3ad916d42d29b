"""Scores of an evaluation: what counts as right, what foreign SQL may do, what is refused and shown."""

import json
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from helpers.config import TINY_MODEL, write_json
from helpers.config import write_config as write_base_config
from helpers.launcher import Run as Started
from helpers.launcher import metrics, says, train, weights
from helpers.real import real_fixture
from train_qwen3_ft import (
    IGNORED,
    Database,
    Judge,
    Run,
    Scorer,
    Values,
    answer_bytes,
    count_scores,
    draw_curve,
    has_order,
    lost_part,
    plain_answer,
    same_rows,
    score_lines,
    score_text,
    split_sample,
    summarize_scores,
)

EMPTY_SAFETENSORS = (2).to_bytes(8, "little") + b"{}"
SCHEMA = """
CREATE TABLE cities (id INTEGER PRIMARY KEY, name TEXT, size REAL);
INSERT INTO cities VALUES (1, 'Oslo', 0.7), (2, 'Rome', 2.8), (3, 'Paris', 2.1), (4, 'Bonn', 0.3);
CREATE TABLE log (id INTEGER PRIMARY KEY AUTOINCREMENT, text TEXT);
CREATE TABLE many (n INTEGER);
WITH RECURSIVE r(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM r WHERE n < 3000)
INSERT INTO many SELECT n FROM r;
"""


AMBIGUOUS = "depend on the order of rows, or of equal ones"


@pytest.fixture
def script(tmp_path: Path) -> Path:
    """A database as a script."""
    path = tmp_path / "cities.sql"
    path.write_text(SCHEMA)
    return path


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """The same as an SQLite file."""
    path = tmp_path / "cities.db"
    with sqlite3.connect(path) as connection:
        connection.executescript(SCHEMA)
    connection.close()
    return path


@pytest.fixture
def judge(script: Path) -> Callable[..., dict]:
    """judge(answer, reference): its scores under `score: sql`."""
    judge = Judge(Values(score="sql", score_database=str(script)))
    return lambda answer, reference: judge.judge(answer, reference, "")


# --- exact


@pytest.mark.parametrize(
    "answer",
    [
        "SELECT 1",
        " SELECT 1\n",
        "SELECT 1;",
        "SELECT 1 ;\n",
        "```sql\nSELECT 1;\n```",
        "```\nSELECT 1\n```",
        "```SELECT 1```",
        "<think>\n\n</think>\n\nSELECT 1",
        "<think>SELECT 2?</think>```sql\nSELECT 1\n```",
    ],
)
def test_what_does_not_belong_to_an_answer_does_not_count(answer: str) -> None:
    assert plain_answer(answer) == "SELECT 1"


@pytest.mark.parametrize(
    "answer", ["select 1", "SELECT  1", "SELECT 1 -- one", "", "`SELECT 1`"]
)
def test_what_belongs_to_an_answer_counts(answer: str) -> None:
    assert plain_answer(answer) != "SELECT 1"


# --- execution


ALIKE = [
    (
        "other words",
        "SELECT name FROM cities WHERE size > 2",
        "select c.name from cities c where 2 < c.size",
    ),
    ("another order", "SELECT name FROM cities ORDER BY size DESC", "SELECT name FROM cities"),
    (
        "an order inside",
        "SELECT name FROM cities",
        "SELECT name FROM (SELECT name FROM cities ORDER BY 1)",
    ),
    ("an int and a float", "SELECT 2 UNION ALL SELECT 1", "SELECT 1.0 UNION ALL SELECT 2.0"),
    (
        "rounding",
        "SELECT 0.1 + 0.2, 1 UNION ALL SELECT 0.3, 2",
        "SELECT 0.3, 1 UNION ALL SELECT 0.1 + 0.2, 2",
    ),
    (
        "the same insert",
        "INSERT INTO log (text) VALUES ('a')",
        "INSERT INTO log VALUES (1, 'a')",
    ),
    (
        "the same update",
        "UPDATE cities SET size = 1 WHERE id = 1",
        "UPDATE cities SET size = 1.0 WHERE name = 'Oslo'",
    ),
    ("the same delete", "DELETE FROM many", "DELETE FROM many WHERE n > 0"),
    ("nothing deleted", "DELETE FROM many WHERE n < 0", "DELETE FROM cities WHERE id < 0"),
]
UNLIKE = [
    (
        "other rows",
        "SELECT name FROM cities WHERE size > 1",
        "SELECT name FROM cities WHERE size > 2.5",
    ),
    ("a row twice", "SELECT 1", "SELECT 1 UNION ALL SELECT 1"),
    ("the wrong order", "SELECT name FROM cities", "SELECT name FROM cities ORDER BY size"),
    ("another column", "SELECT name, id FROM cities", "SELECT id, name FROM cities"),
    ("ids near one another", "SELECT 1000000", "SELECT 1000001"),
    ("large ids", "SELECT 9007199254740993", "SELECT 9007199254740992"),
    ("text for a number", "SELECT '1'", "SELECT 1"),
    ("nothing for null", "SELECT 1 WHERE 0", "SELECT NULL"),
    ("null for nothing", "SELECT NULL", "SELECT ''"),
    ("a read for a write", "SELECT * FROM many WHERE 0", "DELETE FROM many WHERE n < 0"),
    (
        "another update",
        "UPDATE cities SET size = 2 WHERE id = 1",
        "UPDATE cities SET size = 1 WHERE id = 1",
    ),
    ("another table", "DELETE FROM cities", "DELETE FROM many"),
    (
        "one table more",
        "INSERT INTO log (text) VALUES ('b')",
        "INSERT INTO log (text) VALUES ('a')",
    ),
    ("a mistake", "SELEC 1", "SELECT 1"),
    ("no answer", "", "SELECT 1"),
    ("two statements", "SELECT 1; SELECT 1", "SELECT 1"),
]


@pytest.mark.parametrize(
    ("answer", "wanted"), [row[1:] for row in ALIKE], ids=[row[0] for row in ALIKE]
)
def test_an_answer_that_does_the_same_is_right(judge, answer, wanted) -> None:
    row = judge(answer, wanted)
    assert (row["execution"], row["error"]) == (1.0, "")


@pytest.mark.parametrize(
    ("answer", "wanted"), [row[1:] for row in UNLIKE], ids=[row[0] for row in UNLIKE]
)
def test_an_answer_that_does_something_else_is_wrong(judge, answer, wanted) -> None:
    assert judge(answer, wanted)["execution"] == 0.0


def test_a_write_is_undone(judge) -> None:
    delete, count = "DELETE FROM cities", "SELECT COUNT(*) FROM cities"
    assert judge(delete, delete)["execution"] == 1.0
    assert judge(count, "SELECT 4")["execution"] == 1.0


def test_a_reference_that_fails_does_not_count(judge) -> None:
    row = judge("SELECT 1", "SELECT a FROM nowhere")
    assert "execution" not in row
    says(row["error"], "^not judged: the reference fails: no such table: nowhere")
    assert count_scores([row], ["exact", "execution"]) == {
        "exact": [0.0, 1],
        "execution": [0, 0],
    }


@pytest.mark.parametrize(
    ("statement", "ordered"),
    [
        ("SELECT a FROM t ORDER BY a", True),
        ("select a from t order\n by a limit 3", True),
        ("SELECT a FROM t UNION SELECT b FROM u ORDER BY 1", True),
        ("SELECT a FROM t", False),
        ("SELECT a FROM (SELECT a FROM t ORDER BY a)", False),
        ("SELECT rank() OVER (PARTITION BY f(a) ORDER BY a) FROM t", False),
        ("SELECT 'ORDER BY' FROM t", False),
        ('SELECT "order by" FROM t', False),
        ("SELECT a FROM t -- ORDER BY a", False),
        ("SELECT a /* ORDER BY a */ FROM t", False),
        ("SELECT ')' FROM t ORDER BY a", True),
    ],
)
def test_only_order_by_at_the_top_level_counts(statement: str, ordered: bool) -> None:
    assert has_order(statement) is ordered


def test_rows_are_compared_as_a_multiset_within_rounding() -> None:
    assert same_rows([(1.0, "a"), (2, "b")], [(2.0000001, "b"), (1, "a")], False)
    assert not same_rows([(1.0, "a"), (2, "b")], [(2.00001, "b"), (1, "a")], False)
    assert not same_rows([(1,), (1,), (2,)], [(1,), (2,), (2,)], False)


@pytest.mark.parametrize(
    ("statement", "problem"),
    [
        ("SELECT name FROM cities WHERE id = 9", "have an empty result"),
        ("DELETE FROM cities WHERE id = 9", "have an empty result"),
        ("SELECT name FROM cities LIMIT 1", AMBIGUOUS),
        ("SELECT name FROM cities ORDER BY id > 2 LIMIT 1", AMBIGUOUS),
        ("SELECT name FROM cities ORDER BY id > 2", AMBIGUOUS),
        ("SELECT DISTINCT name FROM cities ORDER BY name", ""),
        ("SELECT name FROM cities ORDER BY id LIMIT 1", ""),
        ("SELECT COUNT(*) FROM cities WHERE id = 9", ""),
        ("DELETE FROM cities", ""),
        (
            "SELECT x FROM cities",
            "cannot judge (not judged: the reference fails: no such column: x)",
        ),
    ],
)
def test_references_that_judge_poorly_are_named(script: Path, statement, problem) -> None:
    judge = Judge(Values(score="sql", score_database=str(script)))
    assert judge.describe(statement, "")[0] == problem


# --- foreign SQL


ATTACKS = {
    "attach": "ATTACH '{folder}/evil.db' AS e",
    "pragma": "PRAGMA writable_schema = ON",
    "pragma table": "SELECT * FROM pragma_database_list",
    "drop": "DROP TABLE cities",
    "create": "CREATE TABLE evil (a)",
    "temporary": "CREATE TEMP TABLE evil (a)",
    "vacuum": "VACUUM INTO '{folder}/evil.db'",
    "extension": "SELECT load_extension('{folder}/evil.so')",
    "commit": "COMMIT",
    "rollback": "ROLLBACK",
    "savepoint": "SAVEPOINT evil",
    "schema": "UPDATE sqlite_master SET sql = ''",
    "sequence": "DELETE FROM sqlite_sequence",
    "recursion": "WITH RECURSIVE r(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM r) SELECT COUNT(*) FROM r",
    "rows without end": "WITH RECURSIVE r(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM r) SELECT n FROM r",
    "cross join": "SELECT COUNT(*) FROM many a, many b, many c, many d",
    "sorted cross join": "SELECT * FROM many a, many b, many c ORDER BY a.n + b.n + c.n",
    "inserted cross join": "INSERT INTO many SELECT a.n FROM many a, many b, many c",
    "huge value": "SELECT zeroblob(1000000000)",
    "huge text": "SELECT replace(hex(zeroblob(40000)), '0', hex(zeroblob(40000)))",
    "many large values": "SELECT hex(zeroblob(40000)) FROM many",
    "nesting": "SELECT " + "(" * 900 + "1" + ")" * 900,
    "long statement": "SELECT " + "+".join(["1"] * 60_000),
    "two statements": "SELECT 1; DROP TABLE cities",
    "null byte": "SELECT 1\0",
    "no text": "SELECT '\ud800'",
}  # fmt: skip


@pytest.mark.parametrize("attack", ATTACKS)
def test_an_attack_is_wrong_within_two_seconds_and_leaves_nothing(
    file: Path, tmp_path: Path, attack: str
) -> None:
    """Seconds of processor time, which another test beside this one does not take."""
    judge = Judge(Values(score="sql", score_database=str(file)))
    files, content = set(tmp_path.iterdir()), file.read_bytes()
    begun = time.thread_time()
    row = judge.judge(ATTACKS[attack].format(folder=tmp_path), "SELECT 1", "")
    assert time.thread_time() - begun < 2
    assert row["execution"] == 0.0 and row["error"]
    assert judge.judge("SELECT COUNT(*) FROM cities", "SELECT 4", "")["execution"] == 1.0
    assert (
        judge.judge("SELECT MAX(n), COUNT(*) FROM many", "SELECT 3000, 3000", "")["execution"]
        == 1.0
    )
    assert set(tmp_path.iterdir()) == files and file.read_bytes() == content


def test_a_large_database_is_only_read(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("train_qwen3_ft.COPIED", 100)
    judge = Judge(Values(score="sql", score_database=str(file)))
    assert (
        judge.judge("SELECT name FROM cities", "SELECT name FROM cities", "")["execution"]
        == 1.0
    )
    row = judge.judge("DELETE FROM cities", "DELETE FROM cities", "")
    says(row["error"], "^not judged: the reference fails: attempt to write a readonly database")
    assert judge.judge("SELECT COUNT(*) FROM cities", "SELECT 4", "")["execution"] == 1.0


def test_a_database_with_a_write_ahead_log_is_read_whole(file: Path) -> None:
    writer = sqlite3.connect(file)
    writer.execute("PRAGMA journal_mode = WAL")
    writer.execute("INSERT INTO log (text) VALUES ('new')")
    writer.commit()
    try:
        assert Database(file).outcome("SELECT text FROM log")[0] == [("new",)]
    finally:
        writer.close()
    assert Database(file).outcome("DELETE FROM log")[1] == {"log": []}


def test_text_that_is_not_utf8_can_be_judged(file: Path) -> None:
    with sqlite3.connect(file) as connection:
        connection.execute("INSERT INTO log (text) VALUES (CAST(x'ff' AS TEXT))")
    connection.close()
    assert Database(file).same("SELECT text FROM log", "SELECT text FROM log")


# --- a script


@pytest.mark.parametrize(
    ("body", "scores"),
    [
        ("return len(answer) / 10", {"score": 0.3}),
        ("return {'words': 0.5, 'same': answer == reference}", {"words": 0.5, "same": 0.0}),
        ("return prompt == 'p'", {"score": 1.0}),
    ],
    ids=["a number", "several", "the prompt"],
)
def test_a_script_scores(tmp_path: Path, body: str, scores: dict) -> None:
    path = tmp_path / "mine.py"
    path.write_text(f"def score(answer, reference, prompt):\n    {body}\n")
    row = Judge(Values(score=str(path))).judge("<think>x</think>abc", "abcd", "p")
    assert row == {"exact": 0.0, "error": "", **scores}


@pytest.mark.parametrize("value", ["'good'", "None", "float('nan')", "{'a': []}"])
def test_what_a_script_gives_must_be_numbers(tmp_path: Path, value: str) -> None:
    path = tmp_path / "mine.py"
    path.write_text(f"def score(answer, reference, prompt):\n    return {value}\n")
    row = Judge(Values(score=str(path))).judge("a", "a", "")
    assert row["error"] and set(row) == {"exact", "error"}


def test_an_answer_for_which_a_script_fails_counts_as_wrong(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text("def score(answer, reference, prompt):\n    return int(answer)\n")
    judge = Judge(Values(score=str(path)))
    rows = [judge.judge(answer, "1", "") for answer in ("1", "one")]
    says(rows[1]["error"], "^ValueError: invalid literal")
    assert count_scores(rows, ()) == {"exact": [1.0, 2], "score": [1.0, 2]}


# --- prompts and references


def test_the_last_part_that_is_learned_is_the_reference() -> None:
    labels = [IGNORED, 2, 3, IGNORED, IGNORED, 6, 7, IGNORED]
    sample = split_sample([1, 2, 3, 4, 5, 6, 7, 8], labels)
    assert (sample.prompt, sample.reference) == ([1, 2, 3, 4, 5], [6, 7])


def test_all_ranks_draw_the_same_whole_samples() -> None:
    rows = [{"input_ids": [n, 5, 9], "labels": [IGNORED, 5, 9]} for n in range(100)]
    rows += [{"input_ids": [100, 5], "labels": [IGNORED, 5]}]  # its reference was cut
    drawn = []
    for _ in ("rank 0", "rank 1"):
        trainer = SimpleNamespace(args=SimpleNamespace(seed=42))
        config = SimpleNamespace(values=Values(score="exact", score_samples=500))
        scorer = Scorer(SimpleNamespace(trainer=trainer, config=config))
        scorer.ends = [9]
        drawn.append([sample.prompt for sample in scorer.samples(rows)])
    assert drawn[0] == drawn[1]
    assert sorted(drawn[0]) == [[n] for n in range(100)] != drawn[0]


def test_a_reference_that_was_cut_is_known_by_its_end() -> None:
    assert lost_part([IGNORED, 5, 9], {9}) == 0
    assert lost_part([IGNORED, 5, 6], {9}) == 1


def test_an_answer_of_14b_takes_what_its_cache_and_one_layer_take() -> None:
    shape = {"hidden_size": 5120, "num_hidden_layers": 40, "num_attention_heads": 40, "num_key_value_heads": 8,
             "head_dim": 128, "intermediate_size": 17408, "vocab_size": 151936}  # fmt: skip
    cache = 2 * 40 * 8 * 128 * 2 * 1000
    assert 1.25 * cache < answer_bytes(shape, 1000, 2) < 3 * cache


# --- what is refused


BROKEN = {
    "no rule for it": ({"score": "bleu"}, r"score: expected exact, sql, or a script"),
    "no database": ({"score": "sql"}, r"score: sql needs score_database"),
    "a database without sql": ({"score": "exact", "score_database": "here.sql"}, r"score_database: needs score: sql"),
    "samples without a score": ({"score_samples": 10}, r"score_samples: needs score"),
    "no samples": ({"score": "exact", "score_samples": 0}, r"score_samples: expected 1 or more"),
    "a missing database": ({"score": "sql", "score_database": "nowhere.db"}, r"score_database: .*nowhere\.db"),
    "a broken script of a database": ({"score": "sql", "score_database": "bad.sql"}, r"bad\.sql: .*syntax error; expected an SQLite"),
    "a broken database": ({"score": "sql", "score_database": "bad.db"}, r"bad\.db: file is not a database"),
    "an empty database": ({"score": "sql", "score_database": "empty.sql"}, r"empty\.sql: has no tables"),
    "a missing script": ({"score": "nowhere.py"}, r"score: .*nowhere\.py: no such file"),
    "a broken script": ({"score": "bad.py"}, r"score: .*bad\.py: .*expected a Python file"),
    "a script without score()": ({"score": "other.py"}, r"score: .*other\.py: has no function score"),
    "no evaluation data": ({"score": "exact", "val_size": None}, r"score: there is nothing to evaluate on"),
    "no evaluation": ({"score": "exact", "eval_strategy": "no"}, r"score: nothing is evaluated"),
    "preferences": ({"score": "exact", "stage": "kto"}, r"score: needs stage: sft"),
    "text": ({"score": "exact", "stage": "pt"}, r"score: needs stage: sft"),
    "packing": ({"score": "exact", "packing": True}, r"packing: cannot be combined with score"),
    "packing of its own kind": ({"score": "exact", "neat_packing": True}, r"neat_packing: cannot be combined with score"),
    "learned prompts": ({"score": "exact", "train_on_prompt": True}, r"train_on_prompt: cannot be combined"),
    "streaming": ({"score": "exact", "streaming": True, "max_steps": 5, "val_size": 4}, r"streaming: cannot be combined"),
    "generation of LLaMA-Factory": ({"score": "exact", "predict_with_generate": True}, r"predict_with_generate: cannot be combined with score"),
    "a metric that is not scored": (
        {"score": "exact", "metric_for_best_model": "execution", "load_best_model_at_end": True},
        r"metric_for_best_model: .*set metric_for_best_model: loss or exact",
    ),
}  # fmt: skip


@pytest.fixture
def scored(here: Callable, write_config: Callable, tmp_path: Path) -> Callable[..., str]:
    """scored(**changes): what a dry run of a configuration with an evaluation says."""
    (tmp_path / "here.sql").write_text(SCHEMA)
    (tmp_path / "bad.sql").write_text("CREATE TABLE t (a); nonsense;")
    (tmp_path / "empty.sql").write_text("SELECT 1;")
    (tmp_path / "bad.db").write_bytes(b"no database" * 100)
    (tmp_path / "bad.py").write_text("def score(:")
    (tmp_path / "other.py").write_text("def scores(): pass")
    (tmp_path / "mine.py").write_text("def score(answer, reference, prompt):\n    return 1\n")

    def check(**changes: object) -> str:
        values = {
            "eval_strategy": "steps",
            "val_size": 0.2,
            "save_strategy": "steps",
            **changes,
        }
        return here(write_config(**values), "--dry-run").stderr

    return check


@pytest.mark.parametrize(("changes", "problem"), BROKEN.values(), ids=BROKEN)
def test_a_score_that_cannot_be_is_refused(scored, changes: dict, problem: str) -> None:
    says(scored(**changes), problem)


@pytest.mark.parametrize(
    "changes",
    [
        {"score": "exact"},
        {"score": "sql", "score_database": "here.sql"},
        {"score": "mine.py"},
        {"score": "exact", "metric_for_best_model": "exact", "load_best_model_at_end": True},
        {
            "score": "sql",
            "score_database": "here.sql",
            "metric_for_best_model": "eval_execution",
        },
        {"score": "mine.py", "metric_for_best_model": "beauty", "save_strategy": "best"},
        {"score": "exact", "metric_for_best_model": "exact", "early_stopping_steps": 2},
        {"score": "exact", "eval_strategy": "no", "do_eval": True},
        {"score": "exact", "finetuning_type": "lora"},
    ],
    ids=lambda changes: ", ".join(f"{key}={value}" for key, value in changes.items()),
)
def test_a_score_that_can_be_is_accepted(scored, changes: dict) -> None:
    assert scored(**changes) == ""


# --- --score


def test_a_model_is_scored_without_training(plan_of, write_config, tmp_path: Path) -> None:
    config = write_config(eval_strategy="steps", val_size=0.2, score="exact", run_name="mine")
    plan = plan_of("--score", tmp_path / "model", config)
    assert plan["problems"] == [] or all("safetensors" in text for text in plan["problems"])
    assert (plan["total_steps"], plan["samples"]) == (None, None)


def test_the_model_of_the_configuration_is_scored_where_none_is_named(
    plan_of, write_config
) -> None:
    assert plan_of("--score", write_config(val_size=0.2))["problems"] == []


def test_a_run_is_scored_with_its_own_configuration(here, write_config, tmp_path: Path) -> None:
    run = write_config(name="model/config.yaml", val_size=0.2).parent
    write_config(val_size=0.2)
    for model in (run, run / "checkpoint-4"):
        write_json(model / "config.json", TINY_MODEL)
        (model / "model.safetensors").write_bytes(EMPTY_SAFETENSORS)
        shown = here("--score", model, "--dry-run")
        says(shown.stdout, rf"^model +{model}")
        says(shown.stdout, r"^scores +exact of 100 answers")


def test_an_adapter_is_scored_on_its_base(here, write_config, tmp_path: Path) -> None:
    write_json(tmp_path / "mine" / "adapter_config.json", {})
    shown = here("--score", tmp_path / "mine", write_config(val_size=0.2), "--dry-run")
    says(shown.stdout, r"^method +sft, lora")


def test_scoring_is_no_resume_and_no_rehearsal(here, write_config) -> None:
    for other in ("--resume", "--rehearse"):
        assert here(write_config(), "--score", other).returncode == 2


def test_without_evaluation_data_there_is_nothing_to_score(here, write_config) -> None:
    says(here("--score", write_config(), "--dry-run").stderr, "there is nothing to evaluate on")


# --- what is shown


COUNTS = {"exact": [93.0, 100], "execution": [95.0, 100]}


def scores_of(at: int, exact: float, wrong: list | None = None, **more: object) -> dict:
    """The line of metrics.jsonl after an evaluation."""
    counts = {"exact": [exact, 100]}
    line = {"event": "scores", "time": 1.0, "step": at, "at": at, "name": "", "counts": counts}
    return {**line, "wrong": wrong or [], **more}


def test_counts_are_shown_with_their_uncertainty() -> None:
    assert score_text(COUNTS) == "  exact 93 of 100 (+-5)  execution 95 of 100"


def test_all_right_is_not_certain_either() -> None:
    assert score_text({"exact": [100.0, 100]}) == "  exact 100 of 100 (+-3)"


def test_a_mean_is_shown_as_one() -> None:
    assert "score 0.531" in score_text({"exact": [0.0, 10], "score": [5.31, 10]})


def test_nothing_judged_is_shown_as_that() -> None:
    assert "execution 0 of 0" in score_text({"exact": [0.0, 10], "execution": [0, 0]})


def test_the_first_the_best_and_the_last_score_count(tmp_path: Path) -> None:
    lines = [scores_of(0, 2.0), scores_of(12, 93.0), scores_of(24, 90.0)]
    summary = {"scores": summarize_scores(lines), "wrong_answers": []}
    assert summary["scores"]["exact"]["best"] == [12, 93.0, 100]
    shown = score_lines(Run(tmp_path), summary)
    assert shown["exact"] == (
        "first 2 of 100 (step 0), best 93 of 100 (step 12), last 90 of 100 (step 24)"
    )


def test_wrong_answers_stand_beside_their_references(tmp_path: Path) -> None:
    wrong = [{"answer": "SELECT\n1", "reference": "SELECT 2"}]
    shown = score_lines(Run(tmp_path), {"scores": {}, "wrong_answers": wrong})
    assert (shown["wrong 1"], shown["wanted 1"]) == ("SELECT 1", "SELECT 2")


def test_a_curve_with_scores_epochs_and_a_restart_is_drawn(tmp_path: Path) -> None:
    run = Run(tmp_path)
    lines = [{"event": "begin", "step": 0, "total_steps": 8, "time": 0}]
    lines += [
        {"step": n, "loss": 9.0 - n, "learning_rate": 1e-3, "epoch": n / 4} for n in range(1, 5)
    ]
    lines += [
        {"event": "begin", "step": 4, "total_steps": 8, "time": 0},
        {"step": 5, "loss": float("nan")},
    ]
    lines += [{"step": 6, "eval_loss": 3.0}, scores_of(6, 40.0)]
    run.metrics_file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    draw_curve(run)
    assert (run.path / "training_loss.png").read_bytes().startswith(b"\x89PNG")


# --- a real run

SCORED = {
    "eval_dataset": "code2sql_heldout",
    "eval_strategy": "steps",
    "eval_steps": 2,
    "score_samples": 5,  # three on one rank and two on the other
    "metric_for_best_model": "brevity",
    "load_best_model_at_end": True,
}
# Answers become shorter while the loss falls.
LENGTH = (
    "def score(answer, reference, prompt):\n    return {'brevity': 1 / (1 + len(answer))}\n"
)


@real_fixture
def best(tmp_path_factory: pytest.TempPathFactory) -> Started:
    """The base configuration's run with scores, on a rank that cannot give three answers at once,
    whose other rank is then killed in its third evaluation.
    """
    folder = tmp_path_factory.mktemp("best")
    (folder / "length.py").write_text(LENGTH)
    config = write_base_config(folder, **SCORED, score=str(folder / "length.py"))
    faults = [
        {"point": "out of memory in scoring", "samples": 2},
        {"point": "kill in scoring", "step": 5, "rank": 1},  # two batches in each evaluation
    ]
    return train(folder, config, faults=faults)


def scored_steps(run_dir: Path, name: str) -> dict[int, float]:
    """{step: share} of a score."""
    lines = [line for line in Run(run_dir).read_metrics() if line.get("event") == "scores"]
    assert all(line["counts"][name][1] == SCORED["score_samples"] for line in lines)
    return {line["at"]: line["counts"][name][0] / line["counts"][name][1] for line in lines}


def test_a_rank_that_is_out_of_memory_lowers_the_answers_at_once_on_all(best: Started) -> None:
    says(best.console, r"^likely cause: a GPU is out of memory in an evaluation")
    says(best.console, r"^starting again with per_device_eval_batch_size=4, the same samples")


def test_a_rank_that_is_killed_while_it_scores_costs_a_restart(best: Started) -> None:
    says(best.console, r"^restart 1 of 3: resuming from checkpoint-4$")
    assert sorted(scored_steps(best.run_dir, "brevity")) == [2, 4, 6, 8, 10, 12]


def test_scores_change_no_weight(best: Started, reference) -> None:
    """Nor do the evaluations, the restart in between, and the choice of the best."""
    last = "checkpoint-12"
    assert weights(best.run_dir / last) == weights(reference.run_dir / last)


def test_the_model_is_that_of_the_best_score_and_not_of_the_lowest_loss(best: Started) -> None:
    scores = scored_steps(best.run_dir, "brevity")
    wanted = max(scores, key=scores.get)
    lines = metrics(best.run_dir)
    losses = {line["step"]: line["eval_loss"] for line in lines if "eval_loss" in line}
    assert wanted != min(losses, key=losses.get)
    assert weights(best.run_dir) == weights(best.run_dir / f"checkpoint-{wanted}")


def test_each_evaluation_leaves_its_answers(best: Started) -> None:
    for step in (2, 12):
        lines = (best.run_dir / "scores" / f"step-{step}.jsonl").read_text().splitlines()
        rows = [json.loads(line) for line in lines]
        assert len(rows) == 5
        assert all(
            "Write the SQL of this" in row["prompt"] and row["reference"] for row in rows
        )


def test_a_checkpoint_scored_alone_has_the_scores_of_its_evaluation(
    best: Started, tmp_path: Path
) -> None:
    done = train(tmp_path, "--score", best.run_dir / "checkpoint-12", "run_name=alone")
    alone = best.run_dir.with_name("alone") / "scores" / "step-0.jsonl"
    assert alone.read_text() == (best.run_dir / "scores" / "step-12.jsonl").read_text()
    says(done.console, r"^state +finished$")
    says(done.console, r"^brevity +0\.\d+ \(step 0\)$")
