"""Direct preference optimisation (DPO; Rafailov et al., 2305.18290, equation 7).

L = -log sigmoid(beta [log pi(y_w|x)/pi_ref(y_w|x) - log pi(y_l|x)/pi_ref(y_l|x)]), averaged over
the pairs of a batch; log pi sums over the completion tokens, end of text included. The reference is
the base. Pairs sampled from the base are in-distribution for it and off-policy later, as in the
paper's setting (sampling from pi_ref), without human labels. No label smoothing.

Deviations: dropout is off, in the reference too (TRL).
"""

from trl import DPOConfig, DPOTrainer

from rlsparse.algorithms.context import TrialContext
from rlsparse.algorithms.samples import preference_pairs


def build(context: TrialContext) -> DPOTrainer:
    """Trainer on preference pairs.

    Raises:
        TrialError: see ``samples.preference_pairs``.
    """
    arguments = DPOConfig(
        **context.trainer_arguments(),
        loss_type=["sigmoid"],
        loss_weights=None,
        label_smoothing=0.0,
        f_divergence_type="reverse_kl",
        use_weighting=False,
        ld_alpha=None,
        sync_ref_model=False,
        precompute_ref_log_probs=False,
        disable_dropout=True,
        padding_free=False,
        max_length=None,
    )
    trainer = DPOTrainer(
        context.model,
        ref_model=context.reference(),
        args=arguments,
        train_dataset=context.dataset(preference_pairs(context)),
        processing_class=context.tokenizer,
        optimizers=context.optimizers(),
    )
    context.set_reference(trainer)
    return trainer
