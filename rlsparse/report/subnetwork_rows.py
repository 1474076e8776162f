"""Rows of trials under masks beside the full run: scores, and whether they end in its weights."""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence

from rlsparse.definitions import AGREEMENT_DEFINITIONS, AGREEMENT_RELATIONS, AGREEMENT_SCOPES
from rlsparse.identity import canonical_json
from rlsparse.levels import MASK, level_label
from rlsparse.report.rows import Row, Tables, cell_label, mean, parsed, rows_of
from rlsparse.statistics import t_interval

VACUOUS = 0.99
"""Where the base agrees with the full run on as many of the weights that the latter changed,
agreement at that tolerance says nothing."""
FULL = "full"
"""Relation of a full run to itself; the others are ``definitions.AGREEMENT_RELATIONS``."""
SUBNETWORK, RERUN, OTHER_SEED = AGREEMENT_RELATIONS


def subnetwork_rows(trials: Sequence[Row], tables: Tables) -> list[Row]:
    """A row per mask, full run, rerun and other seed, by cells that are alike but for the mask.

    Args:
        trials: result of ``rows.trial_rows``.
        tables: ``trials`` with the column ``config``, and ``agreement`` if there is one.

    Returns:
        Rows with ``block`` (the other factors), ``is_baseline`` (whether the study's baseline is in
        the block), ``relation``, ``mask`` (label, None without one), ``group, num_planned,
        num_finished, num_failed, mask_density, score_after``; ``difference, difference_low,
        difference_high, num_differences`` of the score to that of the full run of the same seed
        (95 % t interval over seeds; None below two); ``num_pairs, relative_l2``, and ``agreement``:
        scope -> definition -> ``equal, base, vacuous``. Means are over finished runs; agreement is
        a share of the weights in its scope. No rows unless a trial has a mask.
    """
    blocks: dict[str, list[Row]] = defaultdict(list)
    told = {row["trial_id"]: row for row in rows_of(tables, "trials")}
    for trial in trials:
        row = told[trial["trial_id"]]
        alike, mask = _without_mask(parsed(row.get("config")))
        blocks[alike].append({**trial, "mask": mask, "mask_density": row.get("mask_density")})
    agreement = _agreement(tables)
    return [
        row
        for runs in blocks.values()
        if any(run["mask"] is not None for run in runs)
        for row in _block(runs, agreement)
    ]


def _without_mask(config: Row) -> tuple[str, str | None]:
    """What trials have in common that differ in seed and mask alone, and the label of the mask."""
    train = config.get("train", {})
    alike = {**config, "seed": None, "train": {**train, "mask": None}}
    mask = train.get("mask")
    return canonical_json(alike), None if mask is None else level_label(mask)


def _block(runs: Sequence[Row], agreement: Mapping[str, Row]) -> list[Row]:
    shared = {
        "block": _label(runs[0]),
        "is_baseline": any(run["role"] == "baseline" for run in runs),
    }
    full = [run for run in runs if run["mask"] is None and run["replicate"] == 0]
    again = [run for run in runs if run["mask"] is None and run["replicate"] > 0]
    masked: dict[str, list[Row]] = defaultdict(list)
    for run in runs:
        if run["mask"] is not None:
            masked[run["group"]].append(run)
    scores = {run["seed"]: run["score_after"] for run in _finished(full)}
    kinds = [(FULL, full), *((SUBNETWORK, own) for own in masked.values()), (RERUN, again)]
    if any(agreement.get(run["trial_id"], {}).get("relation") == OTHER_SEED for run in full):
        kinds.append((OTHER_SEED, full))
    return [
        shared | _row(relation, members, agreement, scores)
        for relation, members in kinds
        if members
    ]


def _label(run: Row) -> str:
    return cell_label(run["algorithm"], {k: v for k, v in run["cell"].items() if k != MASK})


def _finished(runs: Sequence[Row]) -> list[Row]:
    return [run for run in runs if run["status"] == "finished"]


def _row(
    relation: str,
    runs: Sequence[Row],
    agreement: Mapping[str, Row],
    full_scores: Mapping[int, float | None],
) -> Row:
    done = _finished(runs)
    found = [agreement[run["trial_id"]] for run in done if run["trial_id"] in agreement]
    pairs = [pair for pair in found if pair["relation"] == relation]
    row = {
        "relation": relation,
        **{key: runs[0][key] for key in ("mask", "group", "replicate")},
        "num_planned": len(runs),
        "num_finished": len(done),
        "num_failed": sum(run["status"] == "failed" for run in runs),
        "mask_density": mean(run["mask_density"] for run in done),
        "score_after": mean(run["score_after"] for run in done),
        **_difference(done if relation in (SUBNETWORK, RERUN) else [], full_scores),
        "num_pairs": len(pairs),
        "relative_l2": mean(pair["relative_l2"] for pair in pairs),
    }
    return row | {"agreement": _means(pairs)}


def _difference(runs: Sequence[Row], full_scores: Mapping[int, float | None]) -> Row:
    """Score minus that of the full run of the same seed, over seeds."""
    pairs = [(run["score_after"], full_scores.get(run["seed"])) for run in runs]
    known = [own - full for own, full in pairs if own is not None and full is not None]
    interval = [float(v) for v in t_interval(known)] if len(known) > 1 else [None] * 3
    names = ("difference", "difference_low", "difference_high")
    return {**dict(zip(names, interval, strict=True)), "num_differences": len(known)}


def _means(pairs: Sequence[Row]) -> Row:
    """Scope -> definition -> shares that agree, of the trials and of the base."""
    found: Row = {}
    for scope in AGREEMENT_SCOPES:
        found[scope] = {}
        for name in AGREEMENT_DEFINITIONS:
            equal, base = (
                mean(pair[scope][f"num_{side}equal_{name}"] for pair in pairs)
                for side in ("", "base_")
            )
            vacuous = scope == "changed" and base is not None and base >= VACUOUS
            found[scope][name] = {"equal": equal, "base": base, "vacuous": vacuous}
    return found


def _agreement(tables: Tables) -> dict[str, Row]:
    """First trial of each pair -> ``relation, relative_l2``, and per scope the counts as shares."""
    found: dict[str, Row] = defaultdict(dict)
    for row in rows_of(tables, "agreement"):
        size = row["num_elements"]
        shares = {k: v / size if size else None for k, v in row.items() if "equal" in k}
        distance, length = row["sum_sq_difference"], row["sum_sq_update"]
        found[row["trial_id"]] |= {"relation": row["relation"], row["scope"]: shares}
        if row["scope"] == "all":
            relative = math.sqrt(distance / length) if length else None
            found[row["trial_id"]]["relative_l2"] = relative
    return found
