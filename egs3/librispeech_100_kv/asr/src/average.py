"""The average of the best epochs, with the last epoch among them."""

from typing import Any

from espnet3.components.callbacks.default_callbacks import AverageCheckpointsCallback
from lightning.pytorch.callbacks import Callback


class AverageAtTheEnd(Callback):
    """Lets ESPnet3 average once more when the training has ended.

    It averages after each validation, and Lightning saves the epoch after that: the last epoch
    would be left out, and after a single one there would be no average.
    """

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        """Average what is saved."""
        for callback in trainer.callbacks:
            if isinstance(callback, AverageCheckpointsCallback):
                callback.on_validation_end(trainer, pl_module)
