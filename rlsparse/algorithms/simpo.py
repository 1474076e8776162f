"""Simple preference optimisation (SimPO; Meng et al., 2405.14734, equation 6).

L = -log sigmoid(beta/|y_w| log pi(y_w|x) - beta/|y_l| log pi(y_l|x) - gamma), averaged over the
pairs of a batch; |y| counts completion tokens, end of text included. There is no reference. TRL has
it as a loss of CPO, whose likelihood term is off (``cpo_alpha=0``), as are AlphaPO's reward shape
(``alpha=0``) and label smoothing. The paper tunes beta in 2 to 10 and gamma/beta in 0 to 1.

Deviations: pairs as configured, not ranked by a reward model; dropout is off (TRL).
"""

from typing import Any

from rlsparse.algorithms.context import TrialContext
from rlsparse.algorithms.experimental import PAIR_ARGUMENTS, experimental_classes
from rlsparse.algorithms.samples import preference_pairs


def build(context: TrialContext) -> Any:
    """Trainer on preference pairs: a ``CPOTrainer``.

    Raises:
        TrialError: see ``samples.preference_pairs``; or this TRL has no CPO.
    """
    config_class, trainer_class = experimental_classes("cpo", "CPOConfig", "CPOTrainer")
    arguments = config_class(
        **context.trainer_arguments(),
        loss_type="simpo",
        cpo_alpha=0.0,
        alpha=0.0,
        label_smoothing=0.0,
        **PAIR_ARGUMENTS,
    )
    return trainer_class(
        context.model,
        args=arguments,
        train_dataset=context.dataset(preference_pairs(context)),
        processing_class=context.tokenizer,
        optimizers=context.optimizers(),
    )
