"""The history for TensorBoard, where the package of that name is installed."""

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

from cnnft.errors import CnnftError, UsageError
from cnnft.runs.records import Epoch

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


def require_tensorboard() -> None:
    """Raises `UsageError` where the package is missing."""
    if importlib.util.find_spec("tensorboard") is None:
        raise UsageError(
            "--tensorboard needs the package tensorboard: pip install 'cnnft[tensorboard]'"
        )


class Board:
    """Writes scalars of each epoch into `folder`, nothing where that is None.

    TensorBoard's step is the epoch, so that runs with other batch sizes can be compared.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._writer: SummaryWriter | None = None

    def add(self, epoch: Epoch) -> None:
        """Everything is on its way to the disk when this returns.

        Raises:
            CnnftError: the disk is full, or the folder cannot be written to.
        """
        if self._folder is None:
            return
        try:
            self._writer = self._writer or _open(self._folder, epoch.epoch)
            for tag, value in _scalars(epoch).items():
                self._writer.add_scalar(tag, value, epoch.epoch)
            self._writer.flush()
        except OSError as error:
            raise CnnftError(f"{self._folder} cannot be written ({error.strerror})") from error

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


def _open(folder: Path, first_epoch: int) -> "SummaryWriter":
    """What an interrupted session wrote of `first_epoch` and after it is void."""
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder), purge_step=first_epoch)


def _scalars(epoch: Epoch) -> dict[str, float]:
    return {
        "loss/train": epoch.train_loss,
        "loss/val": epoch.val_loss,
        "accuracy/train": epoch.train_accuracy,
        "accuracy/val": epoch.val_accuracy,
        "macro_recall/val": epoch.val_macro_recall,
        "learning_rate/backbone": epoch.lr_backbone,
        "learning_rate/head": epoch.lr_head,
    }
