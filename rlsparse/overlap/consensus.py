"""Consensus of the runs of a cell: weights that changed in exactly k of R runs.

Block 3.3 of 2511.08567 counts how often each weight changes over five runs of one recipe; here the
runs differ in the seed alone, and chance is said beside: under a null, masks are independent within
a stratum, so k follows the Poisson binomial distribution of the runs' densities there.
"""

import numpy as np
import pyarrow as pa

from rlsparse import tables
from rlsparse.overlap.mask_counts import Sums, Totals
from rlsparse.overlap.nulls import expected_agreement


def consensus(totals: Totals) -> pa.Table:
    """Table ``consensus`` of one base and view: per group of runs, all weights, then each module.

    ``cell`` is as in table ``trials``; that of surrogates which a control added has the name of the
    control besides, under ``control``.
    """
    comparison = totals.comparison
    rows: list[dict[str, object]] = []
    parts: list[tuple[str | None, Sums]] = [(None, totals.overall)]
    parts += sorted(totals.modules.items())
    start = 0
    for group in comparison.groups if totals.tensors else ():
        num_runs = len(group.runs)
        here = slice(start, start + num_runs + 1)
        start = here.stop
        for module, sums in parts:
            size = sums["num_elements"].reshape(1).astype(np.int64)
            changed = sums["num_changed"][list(group.runs), None].astype(np.int64)
            uniform = expected_agreement(changed, size)
            counts = [sums[n][here] for n in ("agreeing", "agreeing_tensor", "agreeing_magnitude")]
            for k in range(num_runs + 1):
                found, tensor, magnitude = (count[k].item() for count in counts)
                rows.append(
                    {
                        "cell": group.cell,
                        "algorithm": group.algorithm,
                        "step": group.step,
                        "view": comparison.view,
                        "module": module,
                        "num_runs": num_runs,
                        "k": k,
                        "num_elements": size.item(),
                        "num_changed": found,
                        "expected_uniform": uniform[k].item(),
                        "expected_tensor": tensor,
                        "expected_magnitude": magnitude,
                    }
                )
    return tables.from_rows(rows, "consensus")
