"""Rejection-sampling fine-tuning (RFT; Yuan et al., 2308.01825, section 3.3).

SFT on what the base itself samples and gets right: L = -1/|T| sum_t log pi(y_t | x, y_<t) over the
distinct right completions y of each prompt x, sampled once before the first step. Its data are in
the base's own distribution, which those of SFT on gold completions are not, and nothing is pushed
down: between the two it separates "on its own samples" from "reinforced".

Deviations: completions are told apart by their text, where the paper keeps one for each list of
equations in it; the gold solutions are not added to them; sampling is at the configured temperature
(paper: 0.7); training goes on from the base that was sampled from, not from a model before it.
"""

from trl import SFTTrainer

from rlsparse.algorithms import sft
from rlsparse.algorithms.context import TrialContext
from rlsparse.algorithms.samples import accepted_samples


def build(context: TrialContext) -> SFTTrainer:
    """Trainer on the right completions of the base.

    Raises:
        TrialError: the base got no prompt right.
    """
    return sft.trainer_on(context, accepted_samples(context))
