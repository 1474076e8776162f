"""Odds ratio preference optimisation (ORPO; Hong et al., 2403.07691, equations 6 and 7).

L = L_NLL - beta log sigmoid(log odds(y_w|x) - log odds(y_l|x)), odds(y|x) = p / (1 - p) with p the
geometric mean probability of the completion tokens (end of text included), p = exp(1/|y| log pi).
``beta`` is the paper's lambda. There is no reference.

Deviations: L_NLL is the mean over all tokens of prompt and chosen completion, as in the authors'
code (the paper writes log P(y_w|x), the completion only), and over the tokens of a batch, not first
over each sequence; dropout is off (TRL).
"""

from typing import Any

from rlsparse.algorithms.context import TrialContext
from rlsparse.algorithms.experimental import PAIR_ARGUMENTS, experimental_classes
from rlsparse.algorithms.samples import preference_pairs


def build(context: TrialContext) -> Any:
    """Trainer on preference pairs: an ``ORPOTrainer``.

    Raises:
        TrialError: see ``samples.preference_pairs``; or this TRL has no ORPO.
    """
    config_class, trainer_class = experimental_classes("orpo", "ORPOConfig", "ORPOTrainer")
    arguments = config_class(
        **context.trainer_arguments(),
        **PAIR_ARGUMENTS,
    )
    return trainer_class(
        context.model,
        args=arguments,
        train_dataset=context.dataset(preference_pairs(context)),
        processing_class=context.tokenizer,
        optimizers=context.optimizers(),
    )
