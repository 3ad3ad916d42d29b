"""Write the demo data set, its database, the demo tokenizer and the demo model's configuration.

    python tests/tools/make_demo_data.py

rewrites configs/data/ and configs/demo_model/ byte for byte, because every choice comes from one
seeded generator. How the set is made:

* Five small schemas (shop, library, school, clinic, blog) are described once, in `SCHEMAS`: tables,
  columns and, for each column, the closed pool of values that pairs draw from.
* A `Query` says what one statement does (table, columns, conditions, join, grouping, order, limit,
  values) without saying in which language. The functions named `make_*` draw one, one function per
  kind in `KINDS`.
* The same `Query` is then written twice: as SQL by `to_sql`, and as code by `to_sqlalchemy`,
  `to_django` or `to_gorm`. A pair is the code of one of the three and the SQL.
* Kinds and ORMs take turns, so that each kind of each ORM is seen equally often. A statement is
  used once in the whole set: no two pairs share their SQL, whatever the ORM, so a held-out pair is
  a combination of table, columns, values and operation that training never shows.
* The held-out pairs are picked evenly over kinds and ORMs, before training pairs are shuffled.

The tables are named as the SQL names them: `__tablename__ = "books"` in SQLAlchemy,
`db_table = "books"` in Django, and what GORM derives by itself. Inserts give every column but the
id, because Django and GORM would otherwise write defaults. Deletes touch only tables that no other
table refers to, because Django would otherwise collect the rows that refer to the deleted ones with
statements of its own.
"""

import json
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

SEED = 20240607
PAIRS_PER_KIND_AND_ORM = 37
HELD_OUT = 100
ROWS = 90  # of each table
VOCABULARY = 960

NAMES = ["Ada", "Ben", "Clara", "David", "Emma", "Felix", "Grace", "Hugo", "Leo"]
CITIES = ["Berlin", "Madrid", "Oslo", "Paris", "Rome"]
TITLES = ["Echo", "Garden", "Harbor", "Rivers", "Silence", "Winter"]
SMALL = list(range(1, 10))
HUNDREDS = list(range(100, 901, 100))


def tens(first, last):
    return list(range(first, last + 1, 10))


SCHEMAS = {
    "shop": {
        "customers": {"name": NAMES, "city": CITIES, "age": tens(20, 70)},
        "orders": {
            "customer_id": SMALL,
            "product": ["chair", "desk", "lamp", "sofa", "vase"],
            "status": ["open", "paid", "sent", "void"],
            "price": tens(10, 90),
        },
    },
    "library": {
        "authors": {
            "name": NAMES,
            "country": ["Chile", "France", "India", "Japan", "Kenya"],
            "awards": SMALL,
        },
        "books": {
            "title": TITLES,
            "author_id": SMALL,
            "genre": ["crime", "drama", "essay", "fantasy", "poetry"],
            "pages": HUNDREDS,
        },
    },
    "school": {
        "teachers": {
            "name": NAMES,
            "subject": ["algebra", "biology", "history", "music", "physics"],
            "room": tens(10, 90),
        },
        "courses": {
            "title": TITLES,
            "teacher_id": SMALL,
            "level": ["basic", "expert", "middle"],
            "credits": SMALL,
        },
    },
    "clinic": {
        "doctors": {
            "name": NAMES,
            "field": ["dental", "heart", "skin", "sport"],
            "salary": tens(30, 90),
        },
        "patients": {"name": NAMES, "doctor_id": SMALL, "city": CITIES, "weight": tens(40, 90)},
    },
    "blog": {
        "users": {
            "name": NAMES,
            "role": ["admin", "editor", "guest", "writer"],
            "points": tens(10, 90),
        },
        "posts": {
            "title": TITLES,
            "user_id": SMALL,
            "topic": ["food", "games", "news", "travel"],
            "views": HUNDREDS,
        },
    },
}
TABLES = {name: columns for tables in SCHEMAS.values() for name, columns in tables.items()}
MODELS = {name: name[:-1].capitalize() for name in TABLES}


def parent_of(column):
    """The table that a column such as author_id refers to."""
    return column.removesuffix("_id") + "s"


def is_key(column):
    return column.endswith("_id")


def columns_of(table, wanted):
    """Names of a table's columns whose pool holds `wanted` (str or int); keys are left out."""
    return [
        name
        for name, pool in TABLES[table].items()
        if isinstance(pool[0], wanted) and not is_key(name)
    ]


def keys_of(table):
    return [name for name in TABLES[table] if is_key(name)]


CHILDREN = [table for table in TABLES if keys_of(table)]
PARENTS = {parent_of(key) for table in CHILDREN for key in keys_of(table)}
LEAVES = [table for table in TABLES if table not in PARENTS]

# ---------------------------------------------------------------- what a statement does


class Column(NamedTuple):
    table: str
    name: str


class Condition(NamedTuple):
    column: Column
    operator: str
    value: object


class Aggregate(NamedTuple):
    function: str
    column: Column


@dataclass(frozen=True)
class Query:
    table: str
    action: str = "select"
    columns: tuple = ()
    where: tuple = ()
    key: str = ""  # the column that joins `table` to another one
    aggregate: Aggregate | None = None
    group: Column | None = None
    order: str = ""  # a column of `table`
    descending: bool = False
    limit: int | None = None
    values: dict = field(default_factory=dict)


COMPARISONS = (">", "<", ">=", "<=")
LABELS = {"COUNT": "n", "SUM": "total", "AVG": "mean", "MAX": "top", "MIN": "low"}


def in_order(rng, pool):
    """Two different members of a pool, in the pool's order."""
    return tuple(sorted(rng.sample(pool, 2), key=pool.index))


def text_condition(rng, table):
    column = rng.choice(columns_of(table, str))
    return Condition(
        Column(table, column), rng.choice(["=", "<>"]), rng.choice(TABLES[table][column])
    )


def number_condition(rng, table):
    column = rng.choice(columns_of(table, int))
    return Condition(
        Column(table, column), rng.choice(COMPARISONS), rng.choice(TABLES[table][column][1:-1])
    )


def key_condition(rng, table):
    return Condition(Column(table, rng.choice(["id", *keys_of(table)])), "=", rng.choice(SMALL))


def any_condition(rng, table):
    return rng.choice([text_condition, number_condition, number_condition, key_condition])(
        rng, table
    )


def data_condition(rng, table):
    return rng.choice([text_condition, number_condition])(rng, table)


def plain_columns(table, without=()):
    """The columns that are no keys, less those that the given conditions already name."""
    used = {condition.column.name for condition in without}
    return [
        name for name in columns_of(table, str) + columns_of(table, int) if name not in used
    ]


def make_filter(rng):
    table = rng.choice(list(TABLES))
    return Query(table, where=(any_condition(rng, table),))


def make_filter_two(rng):
    table = rng.choice(list(TABLES))
    return Query(table, where=(text_condition(rng, table), number_condition(rng, table)))


def make_list(rng):
    table = rng.choice(list(TABLES))
    column = rng.choice(columns_of(table, str))
    condition = Condition(Column(table, column), "IN", in_order(rng, TABLES[table][column]))
    return Query(table, where=(condition,))


def make_range(rng):
    table = rng.choice(list(TABLES))
    column = rng.choice(columns_of(table, int))
    condition = Condition(
        Column(table, column), "BETWEEN", in_order(rng, TABLES[table][column])
    )
    return Query(table, where=(condition,))


def make_columns(rng):
    table = rng.choice(list(TABLES))
    names = in_order(rng, plain_columns(table))
    return Query(
        table,
        columns=tuple(Column(table, name) for name in names),
        where=(any_condition(rng, table),),
    )


def make_order(rng):
    table = rng.choice(list(TABLES))
    where = (data_condition(rng, table),)
    return Query(
        table,
        where=where,
        order=rng.choice(plain_columns(table, where)),
        descending=rng.random() < 0.5,
    )


def make_limit(rng):
    table = rng.choice(list(TABLES))
    return Query(
        table,
        order=rng.choice(plain_columns(table)),
        descending=rng.random() < 0.5,
        limit=rng.choice(SMALL),
    )


def make_count(rng):
    table = rng.choice(list(TABLES))
    return Query(table, action="count", where=(any_condition(rng, table),))


def make_aggregate(rng):
    table = rng.choice(list(TABLES))
    aggregate = number_aggregate(rng, table)
    return Query(table, aggregate=aggregate, where=(data_condition(rng, table),))


def number_aggregate(rng, table):
    function = rng.choice(["SUM", "AVG", "MAX", "MIN"])
    return Aggregate(function, Column(table, rng.choice(columns_of(table, int))))


def some_aggregate(rng, table):
    return (
        Aggregate("COUNT", Column(table, "id"))
        if rng.random() < 0.4
        else number_aggregate(rng, table)
    )


def make_group(rng):
    table = rng.choice(list(TABLES))
    return Query(
        table,
        group=Column(table, rng.choice(columns_of(table, str))),
        aggregate=some_aggregate(rng, table),
        where=(number_condition(rng, table),),
    )


def make_join(rng):
    table = rng.choice(CHILDREN)
    key = rng.choice(keys_of(table))
    return Query(table, key=key, where=(data_condition(rng, parent_of(key)),))


def make_join_group(rng):
    table = rng.choice(CHILDREN)
    key = rng.choice(keys_of(table))
    group = Column(parent_of(key), rng.choice(columns_of(parent_of(key), str)))
    return Query(
        table,
        key=key,
        group=group,
        aggregate=some_aggregate(rng, table),
        where=(number_condition(rng, table),),
    )


def make_insert(rng):
    table = rng.choice(list(TABLES))
    values = {name: rng.choice(pool) for name, pool in TABLES[table].items()}
    return Query(table, action="insert", values=values)


def make_update(rng):
    table = rng.choice(list(TABLES))
    where = (any_condition(rng, table),)
    name = rng.choice(plain_columns(table, where))
    values = {name: rng.choice(TABLES[table][name])}
    return Query(table, action="update", values=values, where=where)


def make_delete(rng):
    table = rng.choice(LEAVES)
    return Query(table, action="delete", where=(any_condition(rng, table),))


KINDS = [
    make_filter,
    make_filter_two,
    make_list,
    make_range,
    make_columns,
    make_order,
    make_limit,
    make_count,
    make_aggregate,
    make_group,
    make_join,
    make_join_group,
    make_insert,
    make_update,
    make_delete,
]

# ---------------------------------------------------------------- SQL


def sql_literal(value):
    return f"'{value}'" if isinstance(value, str) else str(value)


def sql_column(query, column):
    return f"{column.table}.{column.name}" if query.key else column.name


def sql_condition(query, condition):
    name, operator, value = (
        sql_column(query, condition.column),
        condition.operator,
        condition.value,
    )
    if operator == "IN":
        return f"{name} IN ({', '.join(map(sql_literal, value))})"
    if operator == "BETWEEN":
        return f"{name} BETWEEN {value[0]} AND {value[1]}"
    return f"{name} {operator} {sql_literal(value)}"


def sql_aggregate(query):
    return f"{query.aggregate.function}({sql_column(query, query.aggregate.column)})"


def sql_selection(query):
    if query.action == "count":
        return "COUNT(*)"
    if query.group:
        label = LABELS[query.aggregate.function]
        return f"{sql_column(query, query.group)}, {sql_aggregate(query)} AS {label}"
    if query.aggregate:
        return sql_aggregate(query)
    if query.columns:
        return ", ".join(sql_column(query, column) for column in query.columns)
    return f"{query.table}.*" if query.key else "*"


def sql_join(query):
    parent = parent_of(query.key)
    return f"JOIN {parent} ON {parent}.id = {query.table}.{query.key}"


def sql_where(query):
    return " AND ".join(sql_condition(query, condition) for condition in query.where)


def sql_order(query):
    return query.order + " DESC" * query.descending


def sql_assignment(query):
    [(name, value)] = query.values.items()
    return f"{name} = {sql_literal(value)}"


def to_sql(query):
    """The statement in SQL: keywords in capitals, literal values, table names only where two tables
    meet.
    """
    if query.action == "insert":
        values = ", ".join(map(sql_literal, query.values.values()))
        return f"INSERT INTO {query.table} ({', '.join(query.values)}) VALUES ({values})"
    if query.action == "update":
        return f"UPDATE {query.table} SET {sql_assignment(query)} WHERE {sql_where(query)}"
    if query.action == "delete":
        return f"DELETE FROM {query.table} WHERE {sql_where(query)}"
    parts = [f"SELECT {sql_selection(query)} FROM {query.table}"]
    if query.key:
        parts.append(sql_join(query))
    if query.where:
        parts.append("WHERE " + sql_where(query))
    if query.group:
        parts.append("GROUP BY " + sql_column(query, query.group))
    if query.order:
        parts.append("ORDER BY " + sql_order(query))
    if query.limit:
        parts.append(f"LIMIT {query.limit}")
    return " ".join(parts)


# ---------------------------------------------------------------- code


def code_literal(value):
    """A string or number as Python and Go both write it."""
    return f'"{value}"' if isinstance(value, str) else str(value)


def code_values(query):
    """The values of an insert as keyword arguments."""
    return ", ".join(f"{name}={code_literal(value)}" for name, value in query.values.items())


def code_list(values):
    return ", ".join(map(code_literal, values))


def alchemy_column(column):
    return f"{MODELS[column.table]}.{column.name}"


PYTHON_OPERATORS = {"=": "==", "<>": "!="}


def alchemy_condition(condition):
    name, operator, value = (
        alchemy_column(condition.column),
        condition.operator,
        condition.value,
    )
    if operator == "IN":
        return f"{name}.in_([{code_list(value)}])"
    if operator == "BETWEEN":
        return f"{name}.between({code_list(value)})"
    return f"{name} {PYTHON_OPERATORS.get(operator, operator)} {code_literal(value)}"


def alchemy_aggregate(query):
    return f"func.{query.aggregate.function.lower()}({alchemy_column(query.aggregate.column)})"


def alchemy_selection(query):
    if query.action == "count":
        return f"select(func.count()).select_from({MODELS[query.table]})"
    if query.group:
        label = LABELS[query.aggregate.function]
        selection = f'select({alchemy_column(query.group)}, {alchemy_aggregate(query)}.label("{label}"))'
        return selection + f".select_from({MODELS[query.table]})" * bool(query.key)
    if query.aggregate:
        return f"select({alchemy_aggregate(query)})"
    columns = ", ".join(map(alchemy_column, query.columns)) or MODELS[query.table]
    return f"select({columns})"


def alchemy_order(query):
    return alchemy_column(Column(query.table, query.order)) + ".desc()" * query.descending


def alchemy_where(query):
    return f".where({', '.join(map(alchemy_condition, query.where))})" if query.where else ""


def alchemy_read(query):
    code = alchemy_selection(query)
    if query.key:
        code += f".join({MODELS[parent_of(query.key)]})"
    code += alchemy_where(query)
    if query.group:
        code += f".group_by({alchemy_column(query.group)})"
    if query.order:
        code += f".order_by({alchemy_order(query)})"
    return code + (f".limit({query.limit})" if query.limit else "")


def to_sqlalchemy(query):
    model = MODELS[query.table]
    if query.action == "insert":
        return f"session.add({model}({code_values(query)}))"
    if query.action == "delete":
        return f"session.execute(delete({model}){alchemy_where(query)})"
    if query.action == "update":
        [(name, value)] = query.values.items()
        change = f"values({name}={code_literal(value)})"
        return f"session.execute(update({model}){alchemy_where(query)}.{change})"
    if query.action == "count" or (query.aggregate and not query.group):
        return f"session.scalar({alchemy_read(query)})"
    if query.columns or query.group:
        return f"session.execute({alchemy_read(query)}).all()"
    return f"session.scalars({alchemy_read(query)}).all()"


LOOKUPS = {
    "=": "",
    "<>": "",
    ">": "__gt",
    "<": "__lt",
    ">=": "__gte",
    "<=": "__lte",
    "IN": "__in",
    "BETWEEN": "__range",
}


def django_name(query, column):
    return (
        column.name
        if column.table == query.table
        else f"{query.key.removesuffix('_id')}__{column.name}"
    )


def django_argument(query, condition):
    name, value = (
        django_name(query, condition.column) + LOOKUPS[condition.operator],
        condition.value,
    )
    if condition.operator == "IN":
        return f"{name}=[{code_list(value)}]"
    if condition.operator == "BETWEEN":
        return f"{name}=({code_list(value)})"
    return f"{name}={code_literal(value)}"


def django_where(query):
    """One .filter() with the conditions in their order; a condition <> becomes .exclude()."""
    calls = []
    for condition in query.where:
        call = "exclude" if condition.operator == "<>" else "filter"
        argument = django_argument(query, condition)
        if calls and calls[-1][0] == call:
            calls[-1][1].append(argument)
        else:
            calls.append((call, [argument]))
    return "".join(f".{call}({', '.join(arguments)})" for call, arguments in calls)


def django_function(query):
    return f'{query.aggregate.function.capitalize()}("{query.aggregate.column.name}")'


def django_selection(query):
    if query.group:
        label = LABELS[query.aggregate.function]
        name = django_name(query, query.group)
        return f'.values("{name}").annotate({label}={django_function(query)})'
    names = code_list(django_name(query, column) for column in query.columns)
    return f".values_list({names})" if names else ""


def to_django(query):
    objects = f"{MODELS[query.table]}.objects"
    if query.action == "insert":
        return f"{objects}.create({code_values(query)})"
    code = objects + django_where(query)
    if query.action == "update":
        [(name, value)] = query.values.items()
        return f"{code}.update({name}={code_literal(value)})"
    if query.action in ("delete", "count"):
        return f"{code}.{query.action}()"
    if query.aggregate and not query.group:
        return f"{code}.aggregate({django_function(query)})"
    code += django_selection(query)
    if query.order:
        code += f'.order_by("{"-" * query.descending}{query.order}")'
    if query.limit:
        code += f"[:{query.limit}]"
    return code


def go_name(column):
    return "".join("ID" if word == "id" else word.capitalize() for word in column.split("_"))


def gorm_condition(query, condition):
    name, operator, value = (
        sql_column(query, condition.column),
        condition.operator,
        condition.value,
    )
    if operator == "IN":
        return f"{name} IN ?", f"[]string{{{code_list(value)}}}"
    if operator == "BETWEEN":
        return f"{name} BETWEEN ? AND ?", code_list(value)
    return f"{name} {operator} ?", code_literal(value)


def gorm_where(query):
    if not query.where:
        return ""
    texts, arguments = zip(
        *(gorm_condition(query, condition) for condition in query.where), strict=True
    )
    return f'.Where("{" AND ".join(texts)}", {", ".join(arguments)})'


def gorm_create(query):
    fields = ", ".join(
        f"{go_name(name)}: {code_literal(value)}" for name, value in query.values.items()
    )
    return f"db.Create(&{MODELS[query.table]}{{{fields}}})"


def gorm_update(query):
    [(name, value)] = query.values.items()
    return f'.Update("{name}", {code_literal(value)})'


def gorm_read(query):
    code = f'.Joins("{sql_join(query)}")' if query.key else ""
    if query.columns or query.aggregate:
        code += f'.Select("{sql_selection(query)}")'
    code += gorm_where(query)
    if query.group:
        code += f'.Group("{sql_column(query, query.group)}")'
    if query.order:
        code += f'.Order("{sql_order(query)}")'
    if query.limit:
        code += f".Limit({query.limit})"
    if query.group or query.columns:
        return code + ".Find(&rows)"
    return code + (".Scan(&value)" if query.aggregate else f".Find(&{query.table})")


def to_gorm(query):
    if query.action == "insert":
        return gorm_create(query)
    model = f"&{MODELS[query.table]}{{}}"
    if query.action == "delete":
        return f"db{gorm_where(query)}.Delete({model})"
    if query.action == "update":
        return f"db.Model({model}){gorm_where(query)}{gorm_update(query)}"
    if query.action == "count":
        return f"db.Model({model}){gorm_where(query)}.Count(&count)"
    if query.columns or query.aggregate:
        return f"db.Model({model}){gorm_read(query)}"
    return f"db{gorm_read(query)}"


WRITERS = {"SQLAlchemy": to_sqlalchemy, "Django": to_django, "GORM": to_gorm}

# ---------------------------------------------------------------- the pairs


def make_pair(orm, query):
    return {
        "instruction": f"Write the SQL of this {orm} code.",
        "input": WRITERS[orm](query),
        "output": to_sql(query),
    }


def draw_unseen(rng, make, seen):
    """A query of one kind whose SQL no earlier query has."""
    for _ in range(10_000):
        query = make(rng)
        if to_sql(query) not in seen:
            seen.add(to_sql(query))
            return query
    raise RuntimeError(f"{make.__name__} has no unseen statement left")


def draw_groups(rng):
    """For every kind and ORM, a list of pairs."""
    seen = set()
    groups = {(make.__name__, orm): [] for make in KINDS for orm in WRITERS}
    for _ in range(PAIRS_PER_KIND_AND_ORM):
        for make in KINDS:
            for orm in WRITERS:
                groups[make.__name__, orm].append(make_pair(orm, draw_unseen(rng, make, seen)))
    return groups


def split_pairs(rng, groups):
    """Take the held-out pairs one from each group in turn; the rest is for training."""
    names = list(groups)
    rng.shuffle(names)
    held_out = [groups[names[turn % len(names)]].pop() for turn in range(HELD_OUT)]
    train = [pair for group in groups.values() for pair in group]
    rng.shuffle(train)
    return train, held_out


def make_pairs():
    rng = random.Random(SEED)
    return split_pairs(rng, draw_groups(rng))


# ---------------------------------------------------------------- schemas


def sql_definition(column, pool):
    if is_key(column):
        return f"{column} INTEGER NOT NULL REFERENCES {parent_of(column)} (id)"
    return f"{column} {'TEXT' if isinstance(pool[0], str) else 'INTEGER'} NOT NULL"


def create_table(name):
    lines = [
        "id INTEGER PRIMARY KEY",
        *(sql_definition(*item) for item in TABLES[name].items()),
    ]
    return f"CREATE TABLE {name} (\n    " + ",\n    ".join(lines) + "\n);\n"


def insert_rows(name):
    """Rows whose values come from the pools of the pairs, so that a condition holds for some only."""
    rng, pools = random.Random(name), TABLES[name].values()
    rows = [[number, *map(rng.choice, pools)] for number in range(1, ROWS + 1)]
    values = ",\n    ".join(f"({', '.join(map(sql_literal, row))})" for row in rows)
    return f"INSERT INTO {name} VALUES\n    {values};\n"


def schema_text(name):
    texts = [f"{create_table(table)}\n{insert_rows(table)}" for table in SCHEMAS[name]]
    return f"-- {name}\n" + "\n".join(texts)


def schemas_text():
    return "\n".join(map(schema_text, SCHEMAS))


# ---------------------------------------------------------------- tokenizer and model configuration

ADDED_TOKENS = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<tool_call>",
    "</tool_call>",
    "<tool_response>",
    "</tool_response>",
    "<think>",
    "</think>",
]
SPECIAL_TOKENS = ADDED_TOKENS[:3]
# A word takes the space before it; digits stand alone; quotes and brackets never join a word, so
# that a value has the same tokens in the code and in the SQL.
SPLIT = r" ?\p{L}+|__|_\p{L}+|\p{N}| ?[^\s\p{L}\p{N}_]+|\s+|_"
CHAT_TEMPLATE = """\
{%- for message in messages -%}
{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ '<|im_start|>assistant\\n' }}
{%- if enable_thinking is defined and not enable_thinking -%}
{{ '<think>\\n\\n</think>\\n\\n' }}
{%- endif -%}
{%- endif -%}
"""


def training_texts(pairs):
    """What the tokenizer learns from: the parts of each training pair."""
    for pair in pairs:
        yield from (pair["instruction"] + "\n" + pair["input"], pair["output"])
        yield from ("user\n", "assistant\n", "system\n", "\n\n")


def make_tokenizer(pairs):
    from tokenizers import (
        AddedToken,
        Regex,
        Tokenizer,
        decoders,
        models,
        pre_tokenizers,
        trainers,
    )

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(ADDED_TOKENS),
        show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    tokenizer.train_from_iterator(training_texts(pairs), trainer)
    tokenizer.add_tokens(
        [
            AddedToken(token, special=token in SPECIAL_TOKENS, normalized=False)
            for token in ADDED_TOKENS
        ]
    )
    return tokenizer


def tokenizer_config():
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": None,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "unk_token": None,
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 512,
        "chat_template": CHAT_TEMPLATE,
    }


def model_config(tokenizer):
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "vocab_size": VOCABULARY,
        "hidden_size": 192,
        "intermediate_size": 576,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "head_dim": 32,
        "hidden_act": "silu",
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "initializer_range": 0.06,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "tie_word_embeddings": True,
        "use_cache": True,
        "bos_token_id": None,
        "eos_token_id": tokenizer.token_to_id("<|im_end|>"),
        "pad_token_id": tokenizer.token_to_id("<|endoftext|>"),
        "dtype": "float32",
    }


def generation_config(tokenizer):
    return {
        "do_sample": False,
        "eos_token_id": tokenizer.token_to_id("<|im_end|>"),
        "pad_token_id": tokenizer.token_to_id("<|endoftext|>"),
    }


# ---------------------------------------------------------------- files


def as_json(value):
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def dataset_info():
    columns = {"prompt": "instruction", "query": "input", "response": "output"}
    return {
        name: {"file_name": f"{name}.json", "formatting": "alpaca", "columns": columns}
        for name in ("code2sql_demo", "code2sql_heldout")
    }


def data_files():
    """Text of each file of configs/data by name."""
    train, held_out = make_pairs()
    return {
        "code2sql_demo.json": as_json(train),
        "code2sql_heldout.json": as_json(held_out),
        "dataset_info.json": as_json(dataset_info()),
        "schemas.sql": schemas_text(),
    }


def model_files():
    """Text of each file of configs/demo_model by name."""
    train, _ = make_pairs()
    tokenizer = make_tokenizer(train)
    return {
        "config.json": as_json(model_config(tokenizer)),
        "generation_config.json": as_json(generation_config(tokenizer)),
        "tokenizer.json": tokenizer.to_str(pretty=True) + "\n",
        "tokenizer_config.json": as_json(tokenizer_config()),
    }


def write_files(folder, files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name).write_bytes(text.encode("utf-8"))


def write_all(configs):
    """Write data/ and demo_model/ under a folder."""
    write_files(Path(configs) / "data", data_files())
    write_files(Path(configs) / "demo_model", model_files())


if __name__ == "__main__":
    write_all(Path(__file__).resolve().parent.parent.parent / "configs")
