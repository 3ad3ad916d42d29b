"""The demo data set: its size, its coverage, and that every SQL statement does what its code does.

The SQLAlchemy and Django code is evaluated with the ORM itself, on models derived from schemas.sql,
and compared with the SQL by running both on the same SQLite database: rows for reads, the
contents of all tables for writes. GORM code is not evaluated (that would need Go); the generator
writes it from the same `Query` objects as the other two.
"""

import itertools
import json
import re
import sqlite3

import pytest

from helpers import ROOT
from tools import make_demo_data

CONFIGS = ROOT / "configs"
DATA = CONFIGS / "data"
SCHEMAS = (DATA / "schemas.sql").read_text(encoding="utf-8")
TRAIN = json.loads((DATA / "code2sql_demo.json").read_text(encoding="utf-8"))
HELD_OUT = json.loads((DATA / "code2sql_heldout.json").read_text(encoding="utf-8"))
PAIRS = TRAIN + HELD_OUT
DATA_FILES = ["code2sql_demo.json", "code2sql_heldout.json", "dataset_info.json", "schemas.sql"]
MODEL_FILES = [
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
]
ORMS = ["SQLAlchemy", "Django", "GORM"]
OPERATIONS = {
    "condition": r" WHERE ",
    "two conditions": r" WHERE \S+ (=|<>|IN) .* AND ",
    "list": r" IN \(",
    "range": r" BETWEEN ",
    "join": r" JOIN \w+ ON ",
    "grouping": r"(COUNT|SUM|AVG|MAX|MIN)\(.* GROUP BY ",
    "aggregate": r"^SELECT (SUM|AVG|MAX|MIN)\(\w+\) FROM ",
    "count": r"^SELECT COUNT\(\*\) ",
    "ordering": r" ORDER BY \w+",
    "descending": r" ORDER BY \w+ DESC",
    "limit": r" LIMIT \d+$",
    "insert": r"^INSERT INTO ",
    "update": r"^UPDATE \w+ SET ",
    "delete": r"^DELETE FROM ",
}
WRITES = ("INSERT", "UPDATE", "DELETE")


def pairs_of(orm):
    return [pair for pair in PAIRS if f" {orm} " in pair["instruction"]]


def table_columns():
    """{table: {column: declaration}} as schemas.sql declares them."""
    tables = re.findall(r"CREATE TABLE (\w+) \(\n(.*?)\n\);", SCHEMAS, re.DOTALL)
    return {
        name: dict(line.strip().rstrip(",").split(" ", 1) for line in body.splitlines())
        for name, body in tables
    }


COLUMNS = table_columns()


def model_name(table):
    return table[:-1].capitalize()


def referred_table(declaration):
    found = re.search(r"REFERENCES (\w+) \(id\)", declaration)
    return found and found.group(1)


def fill(connection):
    """Create and fill all tables through a DB-API connection."""
    for statement in SCHEMAS.split(";\n"):
        connection.execute(statement)
    connection.commit()


def contents(execute):
    return {table: execute(f"SELECT * FROM {table} ORDER BY id") for table in COLUMNS}


@pytest.fixture(scope="module")
def database():
    connection = sqlite3.connect(":memory:", isolation_level=None)
    fill(connection)
    yield connection
    connection.close()


def run_sql(connection, sql):
    """Rows of a read, or what all tables hold after a write (which is undone)."""
    connection.execute("BEGIN")
    try:
        rows = connection.execute(sql).fetchall()
        if sql.startswith(WRITES):
            return contents(lambda text: connection.execute(text).fetchall())
        return rows
    finally:
        connection.execute("ROLLBACK")


def comparable(sql, result):
    """The result itself where the order of rows is part of it, else sorted."""
    if sql.startswith(WRITES) or " ORDER BY " in sql:
        return result
    return sorted(result)


# ---------------------------------------------------------------- the set


def test_train_has_1200_to_1600_pairs():
    assert 1200 <= len(TRAIN) <= 1600


def test_held_out_has_100_pairs():
    assert len(HELD_OUT) == 100


def test_pairs_have_the_three_alpaca_fields_and_none_is_empty():
    assert all(
        list(pair) == ["instruction", "input", "output"] and all(pair.values())
        for pair in PAIRS
    )


def test_no_input_is_repeated():
    inputs = [pair["input"] for pair in PAIRS]
    assert len(set(inputs)) == len(inputs)


def test_no_sql_of_the_held_out_pairs_is_in_train():
    assert not {pair["output"] for pair in HELD_OUT} & {pair["output"] for pair in TRAIN}


@pytest.mark.parametrize("orm", ORMS)
@pytest.mark.parametrize("pairs", [TRAIN, HELD_OUT], ids=["train", "held-out"])
def test_each_orm_has_about_a_third_of_the_pairs(pairs, orm):
    share = sum(f" {orm} " in pair["instruction"] for pair in pairs) / len(pairs)
    assert 0.3 < share < 0.37


@pytest.mark.parametrize("orm", ORMS)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_each_operation_is_seen_at_least_20_times_per_orm(operation, orm):
    found = [pair for pair in pairs_of(orm) if re.search(OPERATIONS[operation], pair["output"])]
    assert len(found) >= 20


@pytest.mark.parametrize("table", COLUMNS)
def test_each_table_is_used_by_at_least_50_pairs(table):
    assert sum(bool(re.search(rf"\b{table}\b", pair["output"])) for pair in PAIRS) >= 50


def test_schemas_sql_creates_every_table():
    connection = sqlite3.connect(":memory:")
    connection.executescript(SCHEMAS)
    rows = connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall()
    assert {name for (name,) in rows} == set(COLUMNS) == set(make_demo_data.TABLES)


def test_dataset_info_names_existing_files():
    info = json.loads((DATA / "dataset_info.json").read_text(encoding="utf-8"))
    assert set(info) == {"code2sql_demo", "code2sql_heldout"}
    assert all((DATA / entry["file_name"]).is_file() for entry in info.values())


# ---------------------------------------------------------------- the generator


@pytest.mark.parametrize("name", DATA_FILES)
def test_data_file_is_what_the_generator_writes(name, tmp_path):
    make_demo_data.write_files(tmp_path, make_demo_data.data_files())
    assert (tmp_path / name).read_bytes() == (DATA / name).read_bytes()


@pytest.mark.parametrize("name", MODEL_FILES)
def test_model_file_is_what_the_generator_writes(name, tmp_path):
    pytest.importorskip("tokenizers", reason="the demo tokenizer is trained with tokenizers")
    make_demo_data.write_files(tmp_path, make_demo_data.model_files())
    assert (tmp_path / name).read_bytes() == (CONFIGS / "demo_model" / name).read_bytes()


# ---------------------------------------------------------------- the SQL by itself


def test_every_sql_statement_runs_on_the_schemas(database):
    for pair in PAIRS:
        run_sql(database, pair["output"])


def test_most_statements_find_rows_in_the_seeded_database(database):
    """Else the comparisons below would compare nothing with nothing."""
    before = contents(lambda text: database.execute(text).fetchall())
    empty = [
        sql
        for sql in (pair["output"] for pair in PAIRS)
        if run_sql(database, sql) in ([], before)
    ]
    assert len(empty) < 0.05 * len(PAIRS)


def test_most_statements_give_another_result_without_their_conditions(database):
    """MAX and MIN aside: the extreme of some rows is often that of all rows."""
    sqls = [pair["output"] for pair in PAIRS]
    with_where = [
        sql for sql in sqls if " WHERE " in sql and not re.search(r"(MAX|MIN)\(", sql)
    ]
    same = [
        sql
        for sql in with_where
        if run_sql(database, sql) == run_sql(database, without_where(sql))
    ]
    assert len(same) < 0.02 * len(with_where)


def without_where(sql):
    return re.sub(r" WHERE .*?(?= GROUP BY| ORDER BY| LIMIT|$)", "", sql)


# ---------------------------------------------------------------- SQLAlchemy


def alchemy_model(base, table, columns):
    from sqlalchemy import ForeignKey, Integer, String
    from sqlalchemy.orm import mapped_column

    fields = {"__tablename__": table}
    for name, declaration in columns.items():
        target = referred_table(declaration)
        reference = [ForeignKey(f"{target}.id")] if target else []
        kind = Integer if declaration.startswith("INTEGER") else String
        fields[name] = mapped_column(kind, *reference, primary_key=name == "id")
    return type(model_name(table), (base,), fields)


@pytest.fixture(scope="module")
def alchemy():
    """A function that evaluates SQLAlchemy code, and the connection it uses."""
    sqlalchemy = pytest.importorskip(
        "sqlalchemy", reason="SQLAlchemy code is evaluated with SQLAlchemy"
    )
    from sqlalchemy.orm import DeclarativeBase, Session
    from sqlalchemy.pool import StaticPool

    class Base(DeclarativeBase):
        pass

    names = {name: getattr(sqlalchemy, name) for name in ("select", "update", "delete", "func")}
    names |= {
        model_name(table): alchemy_model(Base, table, columns)
        for table, columns in COLUMNS.items()
    }
    engine = sqlalchemy.create_engine("sqlite://", poolclass=StaticPool)
    raw = engine.raw_connection()
    fill(raw.driver_connection)

    def evaluate(code, is_write):
        with Session(engine) as session:
            result = eval(code, dict(names), {"session": session})
            if is_write:
                session.flush()
                return contents(
                    lambda text: [tuple(row) for row in session.execute(sqlalchemy.text(text))]
                )
            return as_rows(result)

    yield evaluate, engine, names
    raw.close()
    engine.dispose()


def as_rows(result):
    """A list of tuples from objects, rows or one value."""
    if not isinstance(result, list):
        return [(result,)]
    return [as_tuple(item) for item in result]


def as_tuple(item):
    """The columns of a model's object, or a row as it is."""
    tables = {model_name(table): table for table in COLUMNS}
    if type(item).__name__ in tables:
        return tuple(getattr(item, name) for name in COLUMNS[tables[type(item).__name__]])
    return tuple(item.values() if isinstance(item, dict) else item)


def compare_all(orm, evaluate, database):
    """Pairs whose code gives another result than their SQL."""
    wrong = []
    for pair in pairs_of(orm):
        sql = pair["output"]
        result = evaluate(pair["input"], sql.startswith(WRITES))
        if comparable(sql, result) != comparable(sql, run_sql(database, sql)):
            wrong.append(pair)
    return wrong


def test_sqlalchemy_code_gives_the_result_of_its_sql(alchemy, database):
    assert compare_all("SQLAlchemy", alchemy[0], database) == []


def normalised(sql):
    """SQL without brackets, quotes, table names, SQLAlchemy's own labels and layout."""
    sql = re.sub(r'[()"]', " ", sql.replace("!=", "<>").replace("INNER JOIN", "JOIN"))
    sql = re.sub(rf"\b({'|'.join(COLUMNS)})\.", "", sql)
    sql = re.sub(r" AS \w+_1\b| OFFSET 0$", "", sql)
    sql = re.sub(r"\b(count|sum|avg|max|min)\b", lambda found: found.group().upper(), sql)
    sql = re.sub(r"(<>|<=|>=|=|<|>)", r" \1 ", sql)
    return re.sub(r" ?, ?", ", ", " ".join(sql.split()))


def with_star_spelled_out(sql):
    """The SQL with * as the list of the table's columns."""
    table = re.search(r"(?:FROM|UPDATE|INTO) (\w+)", sql).group(1)
    return (
        sql.replace("SELECT *", f"SELECT {', '.join(COLUMNS[table])}")
        if "COUNT" not in sql
        else sql
    )


def test_sqlalchemy_compiles_to_the_text_of_the_sql(alchemy):
    """Reads, updates and deletes; an insert is compiled only when the session writes it."""
    _, engine, names = alchemy
    wrong = []
    for pair in pairs_of("SQLAlchemy"):
        statement = re.fullmatch(
            r"session\.(?:execute|scalars?)\((.*?)\)(?:\.all\(\))?", pair["input"]
        )
        if statement:
            statement = eval(statement.group(1), dict(names))
            text = str(statement.compile(engine, compile_kwargs={"literal_binds": True}))
            if normalised(text) != with_star_spelled_out(normalised(pair["output"])):
                wrong.append(pair)
    assert wrong == []


# ---------------------------------------------------------------- Django


def django_model(models, table, columns):
    fields = {"__module__": __name__}
    fields["Meta"] = type(
        "Meta", (), {"app_label": "demo", "db_table": table, "managed": False}
    )
    for name, declaration in itertools.islice(columns.items(), 1, None):
        target = referred_table(declaration)
        if target:
            fields[name.removesuffix("_id")] = models.ForeignKey(
                model_name(target), on_delete=models.CASCADE
            )
        elif declaration.startswith("TEXT"):
            fields[name] = models.TextField()
        else:
            fields[name] = models.IntegerField()
    return type(model_name(table), (models.Model,), fields)


@pytest.fixture(scope="module")
def django_evaluate():
    """A function that evaluates Django code."""
    django = pytest.importorskip("django", reason="Django code is evaluated with Django")
    from django.conf import settings

    settings.configure(
        DATABASES={"default": {"ENGINE": "django.db.backends.sqlite3", "NAME": ":memory:"}},
        INSTALLED_APPS=[],
        DEFAULT_AUTO_FIELD="django.db.models.AutoField",
        USE_TZ=False,
    )
    django.setup()
    from django.db import connection, models, transaction

    names = {name: getattr(models, name) for name in ("Count", "Sum", "Avg", "Max", "Min")}
    names |= {
        model_name(table): django_model(models, table, columns)
        for table, columns in COLUMNS.items()
    }
    connection.ensure_connection()
    fill(connection.connection)

    def fetch(text):
        with connection.cursor() as cursor:
            return cursor.execute(text).fetchall()

    def evaluate(code, is_write):
        with transaction.atomic():
            result = eval(code, dict(names))
            rows = contents(fetch) if is_write else django_rows(result)
            transaction.set_rollback(True)
        return rows

    yield evaluate
    connection.close()


def django_rows(result):
    """Rows of a query set (objects, tuples or dictionaries), of an aggregate's dictionary or of a
    count.
    """
    if isinstance(result, int):
        return [(result,)]
    if isinstance(result, dict):
        return [tuple(result.values())]
    return [as_tuple(item) for item in result]


def test_django_code_gives_the_result_of_its_sql(django_evaluate, database):
    assert compare_all("Django", django_evaluate, database) == []


def test_a_wrong_statement_is_told_from_the_right_one(database):
    """The comparison sees a missing condition, another limit, another column and another order."""
    right = "SELECT name, city FROM customers WHERE age > 30 ORDER BY name LIMIT 5"
    changes = {
        " WHERE age > 30": "",
        "LIMIT 5": "LIMIT 4",
        "name, city": "name, age",
        "BY name": "BY city",
    }
    wrong = [right.replace(old, new) for old, new in changes.items()]
    expected = comparable(right, run_sql(database, right))
    assert all(comparable(sql, run_sql(database, sql)) != expected for sql in wrong)
