"""Supervised fine-tuning (SFT): the control of every claim about RL.

Loss: mean negative log-likelihood of the completion tokens, end of text included,
L = -1/|T| sum_t log pi(y_t | x, y_<t), over all completion tokens of a batch. Gold completions are
not sampled from the policy, so the data are off-policy; for this project's tiny base they are
also unlike its own untidy output. Dropout is off, as in all other algorithms (TRL leaves it on).
"""

from trl import SFTConfig, SFTTrainer
from trl.trainer.utils import disable_dropout_in_model

from rlsparse.algorithms.context import TrialContext
from rlsparse.algorithms.samples import demonstrations


def build(context: TrialContext) -> SFTTrainer:
    """Trainer on the gold completions of the train split, or on a user's demonstrations.

    Raises:
        TrialError: see ``samples.demonstrations``.
    """
    return trainer_on(context, demonstrations(context))


def trainer_on(context: TrialContext, rows: list[dict[str, str]]) -> SFTTrainer:
    """Trainer on rows ``prompt``, ``completion``."""
    arguments = SFTConfig(
        **context.trainer_arguments(),
        loss_type="nll",
        completion_only_loss=True,
        assistant_only_loss=False,
        packing=False,
        padding_free=False,
        max_length=None,
        shuffle_dataset=False,
        neftune_noise_alpha=None,
        label_smoothing_factor=0.0,
    )
    disable_dropout_in_model(context.model)
    return SFTTrainer(
        context.model,
        args=arguments,
        train_dataset=context.dataset(rows),
        processing_class=context.tokenizer,
        optimizers=context.optimizers(),
    )
