"""Kahneman-Tversky optimisation (KTO; Ethayarajh et al., 2402.01306, equations 7 and 8).

With r = log pi(y|x) - log pi_ref(y|x), summed over completion tokens (end of text included):
L = lambda_D (1 - sigmoid(beta (r - z))) for a right completion and lambda_U (1 - sigmoid(beta (z -
r))) for a wrong one, averaged over a batch. z = max(0, mean over the batch of r(x_i, y_{i-1})), the
KL estimate of the paper from mismatched completions, carries no gradient. The reference is the
base. The paper wants lambda_D n_D / (lambda_U n_U) in [1, 4/3]: right and wrong rows are equally
many here unless they are the user's own.

Deviations: TRL makes the mismatched rows before training, of neighbours in the data, so each epoch
has the order of the first; rows are shuffled here beforehand by ``data_seed``, and the two rows of
one prompt are no lasting neighbours. The mean runs over a micro-batch when gradients are
accumulated. Dropout is off (TRL).
"""

import random

from trl import KTOConfig, KTOTrainer

from rlsparse.algorithms.context import TrialContext
from rlsparse.algorithms.samples import labelled_completions


def build(context: TrialContext) -> KTOTrainer:
    """Trainer on single completions that are right or wrong.

    Raises:
        TrialError: see ``samples.labelled_completions``.
    """
    arguments = KTOConfig(
        **context.trainer_arguments(),
        loss_type="kto",
        train_sampling_strategy="sequential",
        sync_ref_model=False,
        precompute_ref_log_probs=False,
        disable_dropout=True,
        max_length=None,
    )
    rows = labelled_completions(context)
    random.Random(context.config.data_seed).shuffle(rows)
    trainer = KTOTrainer(
        context.model,
        ref_model=context.reference(),
        args=arguments,
        train_dataset=context.dataset(rows),
        processing_class=context.tokenizer,
        optimizers=context.optimizers(),
    )
    context.set_reference(trainer)
    return trainer
