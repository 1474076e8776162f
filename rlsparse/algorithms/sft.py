"""Supervised fine-tuning (SFT) on gold completions: the control of every claim about RL.

Loss: mean negative log-likelihood of the completion tokens, end of text included,
L = -1/|T| sum_t log pi(y_t | x, y_<t), over all completion tokens of a batch. The gold answers are
not sampled from the policy, so the data are off-policy; for this project's tiny base they are
also unlike its own untidy output.
"""

from datasets import Dataset
from trl import SFTConfig, SFTTrainer

from rlsparse.algorithms.context import TrialContext


def build(context: TrialContext) -> SFTTrainer:
    """Trainer on the gold completions of the train split."""
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
    )
    data = Dataset.from_list(
        [{"prompt": p.prompt, "completion": p.completion} for p in context.problems]
    )
    return SFTTrainer(
        context.model,
        args=arguments,
        train_dataset=data,
        processing_class=context.tokenizer,
        optimizers=context.optimizers(),
    )
