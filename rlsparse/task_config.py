"""What problems a trial trains and is scored on: one class per task, torch-free."""

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from rlsparse.variants import Config, function_or


class ProblemSetConfig(Config):
    """What all tasks share.

    ``num_shots`` puts that many solved problems (of the pretrain split) before each prompt, for
    models that were not trained on the task. ``prompt_format: chat`` wraps each prompt in the
    base's chat template. ``num_validation_problems``: on so many of the validation split the model
    is scored after the last step, for claims that choose a level of a factor by it.
    """

    num_shots: int = Field(0, ge=0, le=8)
    num_train_problems: int = Field(768, ge=1)
    num_eval_problems: int = Field(512, ge=1)
    num_validation_problems: int = Field(0, ge=0)
    max_completion_tokens: int = Field(6, ge=1)
    prompt_format: Literal["text", "chat"] = "text"


class ChainSumConfig(ProblemSetConfig):
    """Sums such as ``4 - 1 + 7``, from reasoning-gym; the tiny base was pretrained on them."""

    name: Literal["chain_sum"] = "chain_sum"
    num_terms: int = Field(3, ge=2, le=6)
    num_digits: int = Field(1, ge=1, le=4)


class ProductsConfig(ProblemSetConfig):
    """Products such as ``12 * 34``, from reasoning-gym."""

    name: Literal["products"] = "products"
    num_terms: int = Field(2, ge=2, le=4)
    num_digits: int = Field(2, ge=1, le=4)


class BasicArithmeticConfig(ProblemSetConfig):
    """Expressions such as ``3 * (4 + 2)``, from reasoning-gym."""

    name: Literal["basic_arithmetic"] = "basic_arithmetic"
    num_terms: int = Field(3, ge=2, le=6)
    num_digits: int = Field(1, ge=1, le=4)
    operators: str = Field("+-*", pattern=r"^[-+*/]+$", description="one or more of + - * /")


class SimpleEquationsConfig(ProblemSetConfig):
    """Linear equations in words, from reasoning-gym; answers are free text, checked as maths."""

    name: Literal["simple_equations"] = "simple_equations"
    num_terms: int = Field(2, ge=2, le=5)
    max_value: int = Field(20, ge=2, le=1000)
    max_completion_tokens: int = Field(16, ge=1)


class DatasetConfig(ProblemSetConfig):
    """A user's own problems: a JSONL, CSV or Parquet file or URL, or a hub id ``org/name@rev``.

    ``test_source`` holds the test problems; without it, rows are split by the hash of their prompt.
    ``subset``, ``split`` and ``test_split`` are for hub data sets. ``answer_after`` cuts the answer
    out of a longer text (``"####"`` for GSM8K). ``completion_column`` is the gold text that SFT
    learns (default: a space and the answer). ``grader`` is ``exact``, ``math`` (equal as
    mathematics), or ``module:function`` called with (completion, answer), giving 0 to 1.
    """

    name: Literal["dataset"] = "dataset"
    source: str = Field(min_length=1)
    test_source: str | None = None
    subset: str | None = None
    split: str = "train"
    test_split: str | None = None
    prompt_column: str = "prompt"
    answer_column: str = "answer"
    completion_column: str | None = None
    prompt_template: str = Field(
        "{prompt}", pattern=r"\{prompt\}", description="a text with {prompt}"
    )
    answer_after: str | None = None
    grader: Annotated[str, function_or("exact", "math")] = "exact"
    max_completion_tokens: int = Field(256, ge=1)


TaskConfig = Annotated[
    ChainSumConfig | ProductsConfig | BasicArithmeticConfig | SimpleEquationsConfig | DatasetConfig,
    Field(discriminator="name"),
    BeforeValidator(lambda task: {"name": "chain_sum", **task} if isinstance(task, dict) else task),
]
