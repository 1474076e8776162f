"""Pairs compared on a cluster of three raylets give the rows of the serial diff."""

import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import fsspec
import numpy as np
import planted
import pyarrow as pa
import pytest
import ray
from command import Command
from fsspec.implementations.local import LocalFileSystem
from planted import Pair, Tensor
from ray.cluster_utils import Cluster

from pipelines import pairs
from pipelines.pairs import diff_pairs
from rlsparse import checkpoint
from rlsparse.checkpoint import Checkpoint, fingerprint
from rlsparse.diff import EXTRA_TABLES, Diff, diff_checkpoints, plan_diff
from rlsparse.errors import CheckpointError, PatchError
from rlsparse.patch import Patch, TensorPair, write_patch
from rlsparse.report.diff_rows import json_content

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:ray.data.context")

QUERY = "model.layers.0.self_attn.q_proj.weight"
ALL = {"casts": ["bf16", "fp8_e4m3"], "extra_tables": EXTRA_TABLES}


class Files(LocalFileSystem):
    """Local files under the protocol ``traced``."""

    protocol = "traced"

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return str(super()._strip_protocol(str(path).removeprefix("traced://")))


@pytest.fixture(scope="module")
def traces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder in which every node that reads through ``traced://`` leaves a file of its name."""
    return tmp_path_factory.mktemp("traces")


@pytest.fixture(scope="module")
def cluster(traces: Path) -> Iterator[str]:
    """Address of three raylets of one core each, with this process connected."""

    def register() -> None:  # runs when a worker starts
        class TracedFiles(LocalFileSystem):
            protocol = "traced"

            @classmethod
            def _strip_protocol(cls, path: str) -> str:
                return str(super()._strip_protocol(str(path).removeprefix("traced://")))

            def _open(self, path: str, *given: object, **options: object) -> object:
                (traces / ray.get_runtime_context().get_node_id()).touch()
                if Path(f"{path}.deadly").exists():
                    Path(f"{path}.deadly").rename(f"{path}.died")
                    os.kill(os.getpid(), 9)
                return super()._open(path, *given, **options)

        fsspec.register_implementation("traced", TracedFiles, clobber=True)

    fsspec.register_implementation("traced", Files, clobber=True)
    folder = tempfile.mkdtemp(prefix="rls")  # not tmp_path: paths of sockets must be short
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_TMPDIR", folder)
        nodes = Cluster(True, head_node_args={"num_cpus": 1, "include_dashboard": False})
        try:
            for _ in range(2):
                nodes.add_node(num_cpus=1)
            ray.init(
                nodes.address,
                runtime_env={"worker_process_setup_hook": register},
                log_to_driver=False,
                logging_level="critical",
            )
            ray.data.DataContext.get_current().enable_progress_bars = False
            logging.getLogger("ray.data").setLevel(logging.CRITICAL)
            yield nodes.address
        finally:
            ray.shutdown()
            nodes.shutdown()
            shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of 128 elements, so that small tensors have several."""
    monkeypatch.setattr("rlsparse.diff.chunks", lambda shape: checkpoint.chunks(shape, 128))


def write(pair: Pair, path: Path) -> Patch:
    changed = [
        TensorPair(name, t.dtype, t.shape, t.bits, pair.tensors_after[name].bits)
        for name, t in pair.tensors_before.items()
    ]
    return write_patch(path, changed, base_fingerprint=fingerprint(Checkpoint.open(pair.before)))


def types(value: object) -> object:
    """The types of all that a result holds, at every depth."""
    if isinstance(value, dict):
        return {key: types(part) for key, part in value.items()}
    if isinstance(value, list):
        return [types(part) for part in value]
    return (type(value), value.dtype) if isinstance(value, np.ndarray) else type(value)


def assert_same(found: object, expected: Diff) -> None:
    assert isinstance(found, Diff), found
    np.testing.assert_equal(found.tables, expected.tables)
    assert types(found.tables) == types(expected.tables)
    assert found.to_json() == expected.to_json()
    assert found.pairs == expected.pairs


@pytest.fixture
def kinds(tmp_path: Path) -> list[tuple[Path, Path]]:
    """Pairs of several formats, one with integers and no rows, a patch, and a resized one."""
    made = [planted.make_pair(tmp_path / d, d, seed=i) for i, d in enumerate(("bf16", "fp32"))]
    ids = Tensor("i64", (3,), np.array([1, 2, 3], "<u8"))
    none = Tensor("bf16", (0, 4), np.array([], "<u2"))
    odd = [
        planted.write_folder(tmp_path / f"odd{n}", {"ids": ids, "none": none, "w": ids})
        for n in range(2)
    ]
    rows = planted.random_tensor(np.random.default_rng(0), "bf16", (40, 16))
    grown = {**made[0].tensors_after, "model.embed_tokens.weight": rows}
    write(made[0], tmp_path / "p.patch.safetensors")
    return [
        *((pair.before, pair.after) for pair in made),
        (odd[0], odd[1]),
        (made[0].before, tmp_path / "p.patch.safetensors"),
        (made[0].after, planted.write_folder(tmp_path / "grown", grown)),
    ]


@pytest.mark.parametrize("options", [{}, ALL])
def test_rows_equal_the_serial_reference(
    cluster: str, kinds: list[tuple[Path, Path]], small_chunks: None, options: dict
) -> None:
    steps: list[tuple[int, int]] = []
    found = list(
        diff_pairs(kinds, task_bytes=1500, on_progress=lambda *now: steps.append(now), **options)
    )
    for one, pair in zip(found, kinds, strict=True):
        assert_same(one, diff_checkpoints(*pair, **options))
    total = sum(job.size_bytes for pair in kinds for job in plan_diff(*pair, **options).jobs())
    assert len(steps) > 20
    assert steps == sorted(set(steps))
    assert steps[-1] == (total, total)


def test_tasks_are_cut_by_bytes(tmp_path: Path, small_chunks: None) -> None:
    pair = planted.make_pair(tmp_path)
    jobs = list(plan_diff(pair.before, pair.after).jobs())
    for limit in (1, 600, 1500, 10**9):
        runs = list(pairs._cut(jobs, limit))
        assert [job for run in runs for job in run] == jobs
        sizes = [sum(job.size_bytes for job in run) for run in runs]
        assert all(size <= limit for size, run in zip(sizes, runs, strict=True) if len(run) > 1)
        nexts = [run[0].size_bytes for run in runs[1:]]
        assert all(a + b > limit for a, b in zip(sizes, nexts, strict=False)), "as few as can be"
    assert list(pairs._cut([], 1)) == []


def test_results_out_of_order_and_twice(
    tmp_path: Path, small_chunks: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def backwards(task: Callable, items: list[dict]) -> Iterator[tuple[int, pa.Table]]:
        for item in items[:0:-1] + items[::-1]:
            yield item["number"], task(pa.Table.from_pylist([item]))

    monkeypatch.setattr(pairs, "_on_all_nodes", backwards)
    made = [planted.make_pair(tmp_path / str(n), seed=n) for n in range(3)]
    sides = [(pair.before, pair.after) for pair in made]
    steps: list[tuple[int, int]] = []
    found = diff_pairs(sides, task_bytes=1000, on_progress=lambda *now: steps.append(now), **ALL)
    for one, pair in zip(found, sides, strict=True):
        assert_same(one, diff_checkpoints(*pair, **ALL))
    assert steps == sorted(steps)
    assert steps[-1][0] == steps[-1][1]


def test_what_travels_is_narrow_and_large_typed(tmp_path: Path) -> None:
    """Two million weights of three views come back in a few kilobytes, none of them a weight."""
    shapes = {QUERY: (2048, 1024)}
    pair = planted.make_pair(tmp_path, shapes=shapes)
    for options, limit in (({}, 10_000), ({"extra_tables": ["stripes"]}, 10_000 + 3 * 8 * 3072)):
        plan = plan_diff(pair.before, pair.after, casts=["bf16", "fp16", "fp32"], **options)
        (item,) = pairs._items([list(plan.jobs())])
        row = pairs.measure(pa.Table.from_pylist([item]))
        assert row.num_rows == 1
        assert row.nbytes < limit
        assert len(item["work"]) < 2000
    kinds = {str(kind) for kind in _leaves(row.schema)}
    assert kinds == {"int64", "double", "large_string", "large_binary"}


def _leaves(schema: object) -> Iterator[object]:
    """Types of the values at the ends of a nested schema, whose lists must all be large."""
    for field in schema:
        kind = field.type
        while kind.num_fields == 1:
            assert str(kind).startswith("large_list")
            kind = kind.value_type
        yield from _leaves(list(kind)) if kind.num_fields else [kind]


def test_every_node_reads_and_a_killed_worker_doubles_nothing(
    cluster: str, traces: Path, tmp_path: Path, small_chunks: None
) -> None:
    made = [planted.make_pair(tmp_path / str(n), seed=n) for n in range(4)]
    deadly = made[2].after / "model.safetensors.deadly"
    deadly.touch()
    urls = [(f"traced://{pair.before}", f"traced://{pair.after}") for pair in made]
    found = list(diff_pairs(urls, task_bytes=1000, **ALL))
    assert not deadly.exists()
    assert deadly.with_name("model.safetensors.died").exists()
    for one, pair in zip(found, urls, strict=True):
        assert_same(one, diff_checkpoints(*pair, **ALL))
    nodes = {node["NodeID"] for node in ray.nodes()}
    assert len(nodes) == 3
    assert len({file.name for file in traces.iterdir()} & nodes) >= 2


def test_an_error_concerns_its_pair_alone(cluster: str, tmp_path: Path) -> None:
    good, gone, cut, patched, other = (
        planted.make_pair(tmp_path / name, seed=seed)
        for seed, name in enumerate(("good", "gone", "cut", "patched", "other"))
    )
    damaged = tmp_path / "damaged.patch.safetensors"
    info = write(patched, damaged).data[QUERY]
    content = bytearray(damaged.read_bytes())
    content[info.offset] ^= 1
    damaged.write_bytes(content)
    weights = gone.after / "model.safetensors", cut.after / "model.safetensors"

    def spoil(planned: pairs.Planned) -> pairs.Planned:
        if weights[0].exists():
            weights[0].unlink()
            with weights[1].open("r+b") as stream:
                stream.truncate(2000)
        return planned

    def late(plans: list[pairs.Planned]) -> list[pairs.Planned]:
        return [spoil(plan) for plan in verified(plans)]

    verified = pairs._verified
    wanted = [
        (tmp_path / "nowhere", good.after), (good.before, good.after), (gone.before, gone.after),
        (cut.before, cut.after), (patched.before, damaged), (other.before, damaged),
        (other.before, other.after),
    ]  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pairs, "_verified", late)  # the files are lost after they were planned
        found = list(diff_pairs(wanted, task_bytes=1000))
    for number in (1, 6):
        assert_same(found[number], diff_checkpoints(*wanted[number]))
    said = {number: str(error) for number, error in enumerate(found) if number not in (1, 6)}
    assert said[0].startswith(f"no checkpoint at {tmp_path / 'nowhere'}")
    assert said[2].startswith(f"{weights[0]} is not there on node ")
    assert said[2].endswith(": give a shared folder or a URL")
    assert "was truncated while it was read" in said[3]
    assert said[4].endswith(f"{QUERY}: the bytes of a block have another checksum")
    assert "belongs to another base" in said[5]
    classes = [CheckpointError, Diff, CheckpointError, CheckpointError, PatchError, PatchError]
    assert [type(one) for one in found[:6]] == classes
    assert all("\n" not in line for line in said.values())


def test_the_first_pairs_are_given_before_the_last_are_done(cluster: str, tmp_path: Path) -> None:
    made = [planted.make_pair(tmp_path / str(n), seed=n) for n in range(12)]
    sides = [(pair.before, pair.after) for pair in made]
    steps: list[int] = []
    with closing(diff_pairs(sides, on_progress=lambda done, _: steps.append(done))) as found:
        assert_same(next(found), diff_checkpoints(*sides[0]))
    assert 1 <= len(steps) < 12


def test_nothing_to_do_needs_no_ray() -> None:
    assert list(diff_pairs([])) == []
    (error,) = diff_pairs([("/nowhere", "/nowhere")])
    assert isinstance(error, CheckpointError)


# --- the command -----------------------------------------------------------------------------


@pytest.fixture
def command(tmp_path: Path) -> Iterator[Command]:
    command = Command(tmp_path)
    try:
        yield command
    finally:
        command.close()


def test_the_command_gives_what_it_gives_without_ray(
    cluster: str, command: Command, tmp_path: Path
) -> None:
    """From a folder in which no worker is, with relative paths."""
    planted.make_pair(tmp_path)
    done = command.run("diff", "before", "after", "--ray", "--address", cluster, "--json", "-")
    assert (done.returncode, done.stderr) == (0, "")
    expected = json_content(diff_checkpoints(tmp_path / "before", tmp_path / "after"), None)
    assert json.loads(done.stdout) == json.loads(json.dumps(expected))


def test_mistakes_are_told_before_ray_starts(command: Command, tmp_path: Path) -> None:
    planted.make_pair(tmp_path)
    for arguments, message in (
        (("before", "nowhere", "--ray"), "no checkpoint at nowhere"),
        (("before", "after", "--ray", "--threads", "2"), "--threads: with --ray a task has one"),
        (("before", "after", "--address", "auto"), "--address auto is only for --ray"),
    ):
        done = command.run("diff", *arguments)
        assert done.returncode == 1
        assert message in done.stderr
        assert "Traceback" not in done.stderr
        assert not command.ray_has_run
