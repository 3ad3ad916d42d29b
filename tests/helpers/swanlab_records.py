"""Read back what SwanLab stored: its record of a run (every mode) and its local dashboard's
database.
"""

import json
import sqlite3
from pathlib import Path

import yaml


def records(folder: Path) -> list[Path]:
    """The run folders under a SwanLab log folder, oldest first."""
    return sorted(folder.glob("run-*-*"), key=lambda path: path.stat().st_ctime)


def read_record(folder: Path) -> dict:
    """name, id, state, error, config, console lines and {key: [(step, value)]} from the record
    file.
    """
    from swanlab.proto.swanlab.record.v1.record_pb2 import Record
    from swanlab.proto.swanlab.run.v1.run_pb2 import RunState
    from swanlab.sdk.internal.core_python.store import DataStoreReader

    found = {
        "name": None,
        "id": None,
        "state": "unfinished",
        "error": None,
        "points": {},
        "console": [],
    }
    [file] = folder.glob("run-*.swanlab")
    reader = DataStoreReader()
    reader.open(file)
    for raw in reader:
        record = Record()
        record.ParseFromString(raw)
        kind = record.WhichOneof("record_type")
        if kind == "start":
            found |= {"name": record.start.name, "id": record.start.id}
        elif kind == "finish":
            state = RunState.Name(record.finish.state).removeprefix("RUN_STATE_").lower()
            found |= {"state": state, "error": record.finish.error or None}
        elif kind == "scalar":
            found["points"].setdefault(record.scalar.key, []).append(
                (record.scalar.step, record.scalar.value.number)
            )
        elif kind == "log":
            found["console"].append(record.log.line)
    reader.close()
    config = (
        yaml.safe_load((folder / "files" / "config.yaml").read_text(encoding="utf-8")) or {}
    )
    return {**found, "config": {key: entry["value"] for key, entry in config.items()}}


def read_dashboard(folder: Path) -> dict:
    """The name and status that `swanlab watch` shows for a run of local mode."""
    with sqlite3.connect(
        f"file:{folder.parent / 'runs.swanlab'}?mode=ro", uri=True
    ) as database:
        [(name, status)] = database.execute(
            "select name, status from experiment where run_id = ?", (folder.name,)
        )
    return {"name": name, "status": {0: "running", 1: "finished", -1: "crashed"}[status]}


def dashboard_points(folder: Path, key: str) -> list[tuple[int, float]]:
    """The (step, value) points that `swanlab watch` draws for `key`."""
    with sqlite3.connect(
        f"file:{folder.parent / 'runs.swanlab'}?mode=ro", uri=True
    ) as database:
        [(number,)] = database.execute(
            "select t.folder from tag t join experiment e on e.id = t.experiment_id "
            "where e.run_id = ? and t.name = ?",
            (folder.name, key),
        ).fetchall()
    lines = [
        line
        for path in sorted(
            (folder / "logs" / number).glob("*.log"), key=lambda path: int(path.stem)
        )
        for line in path.read_text(encoding="utf-8").splitlines()
    ]
    return [(point["index"], point["data"]) for point in map(json.loads, lines)]
