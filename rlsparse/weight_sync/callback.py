"""``PatchWriter`` for the Trainers of transformers and TRL."""

import warnings
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from rlsparse.errors import RlsparseWarning, StorageError
from rlsparse.weight_sync.writer import PatchWriter


class PatchWriterCallback(TrainerCallback):  # type: ignore[misc]
    """Sends the weights of a Trainer's model: before training, every so many steps, and at the end.

    Args:
        folder: as of ``PatchWriter``, like all else.
        options: likewise.

    Attributes:
        writer: from the begin of training on.
    """

    writer: PatchWriter

    def __init__(self, folder: str | Path, **options: Any) -> None:
        self._folder = folder
        self._options = options

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any, **_: Any) -> None:
        """Write the first anchor."""
        self.writer = PatchWriter(model, self._folder, **self._options)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Send what is due."""
        self.writer.step()

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Send what is left; that it cannot be written is a warning, as training is done."""
        try:
            self.writer.close()
        except StorageError as error:
            warnings.warn(
                f"what is served lacks the last changes: {error}", RlsparseWarning, stacklevel=2
            )
