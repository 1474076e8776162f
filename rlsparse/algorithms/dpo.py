"""Direct preference optimisation (DPO; Rafailov et al., 2305.18290, equation 7).

L = -log sigmoid(beta [log pi(y_w|x)/pi_ref(y_w|x) - log pi(y_l|x)/pi_ref(y_l|x)]), the reference
being the base. Pairs are sampled from the base at the configured temperature and graded by the
task: for each prompt the first right and the first wrong completion; a prompt whose completions
are all right or all wrong gives no pair. The data are thus in-distribution for the base and
off-policy later, as in the paper's setting (sampling from pi_ref), without human labels.
Dropout is off as in TRL; no label smoothing.
"""

from datasets import Dataset
from trl import DPOConfig, DPOTrainer

from rlsparse.algorithms.context import TrialContext
from rlsparse.config import DpoConfig
from rlsparse.errors import TrialError
from rlsparse.tasks.generate import complete


def build(context: TrialContext) -> DPOTrainer:
    """Trainer on pairs sampled from the base.

    Raises:
        TrialError: the base answers all prompts rightly, or none, so that there are no pairs.
    """
    algorithm = context.config.algorithm
    assert isinstance(algorithm, DpoConfig)
    arguments = DPOConfig(
        **context.trainer_arguments(),
        beta=algorithm.beta,
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
        args=arguments,
        train_dataset=Dataset.from_list(_sample_pairs(context, algorithm)),
        processing_class=context.tokenizer,
        optimizers=context.optimizers(),
    )
    context.set_reference(trainer)
    return trainer


def _sample_pairs(context: TrialContext, algorithm: DpoConfig) -> list[dict[str, str]]:
    count = algorithm.num_samples_per_prompt
    prompts = [p.prompt for p in context.problems for _ in range(count)]
    texts = complete(
        context.model,
        context.tokenizer,
        prompts,
        max_new_tokens=context.task.max_completion_tokens,
        temperature=algorithm.temperature,
    )
    pairs = []
    for index, problem in enumerate(context.problems):
        samples = texts[index * count : (index + 1) * count]
        right = [s for s in samples if context.task.grade(s, problem.answer) == 1]
        wrong = [s for s in samples if context.task.grade(s, problem.answer) == 0]
        if right and wrong:
            pairs.append({"prompt": problem.prompt, "chosen": right[0], "rejected": wrong[0]})
    if not pairs:
        raise TrialError(
            f"dpo found no pair of a right and a wrong completion in {count} samples for each of "
            f"{len(context.problems)} prompts; raise algorithm.num_samples_per_prompt or change "
            "the difficulty of the task"
        )
    return pairs
