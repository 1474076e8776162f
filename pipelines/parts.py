"""Tables that tasks on Ray make in parts; a part is kept while what it is made of is as before.

A task has an item, plain data: ``part`` names what it makes, ``storage`` (URL) and ``source`` (of
the base) say where things lie, and all else is what its results depend on.
"""

from collections.abc import Callable, Collection, Sequence
from typing import Any

import ray

from pipelines.storage import Storage
from pipelines.table_files import table_file
from rlsparse.errors import PatchError, RlsparseError

Item = dict[str, Any]


def run(measure: Callable[[Item], None], items: Sequence[Item]) -> None:
    """Do ``measure`` of each item, on all nodes; needs a Ray session.

    Raises:
        PatchError: files of trials are damaged, one line each; the other items are done.
    """
    data = ray.data.from_items([*items], override_num_blocks=len(items))
    parts = data.map(_try_measure, fn_kwargs={"measure": measure}).take_all()
    if errors := {part["error"] for part in parts if part["error"]}:
        raise PatchError("\n".join(sorted(errors)))


def _try_measure(item: Item, measure: Callable[[Item], None]) -> Item:
    """One task; errors are handed back, because Ray would wrap them in tracebacks."""
    try:
        measure(item)
    except RlsparseError as error:
        return {"part": item["part"], "error": str(error)}
    return {"part": item["part"], "error": ""}


def mark_done(stage: str, item: Item) -> None:
    """Note of what the parts of an item were made."""
    Storage(item["storage"]).write_json(_marker(stage, item), _inputs(item))


def is_done(stage: str, item: Item, tables: Collection[str]) -> bool:
    """Whether the parts of an item are there in these tables, and made of the same inputs."""
    storage, marker = Storage(item["storage"]), _marker(stage, item)
    files = [marker, *(table_file(name, item["part"]) for name in tables)]
    return all(map(storage.exists, files)) and bool(storage.read_json(marker) == _inputs(item))


def drop_stale(storage: Storage, tables: Collection[str], kept: Collection[str]) -> bool:
    """Delete parts of these tables but those ``kept`` (they can be made again); were there any?"""
    stale = [
        table_file(name, part)
        for name in tables
        for file in storage.list(table_file(name))
        if (part := file.removesuffix(".parquet")) not in kept
    ]
    for file in stale:
        storage.delete(file)
    return bool(stale)


def _marker(stage: str, item: Item) -> str:
    return f"stages/{stage}/{item['part']}.json"


def _inputs(item: Item) -> Item:
    """What the parts depend on: not where they lie, so that a study may be moved."""
    return {key: value for key, value in item.items() if key not in ("storage", "source")}
