"""Floor 4: the training loop, averages of the weights, checkpoints, several processes."""

from undiffuse.training.checkpoint import Checkpoint, list_checkpoints, load_checkpoint, save_checkpoint
from undiffuse.training.config import TrainConfig
from undiffuse.training.distributed import World, find_device, join, rank_and_size
from undiffuse.training.posthoc import rebuild
from undiffuse.training.run_folder import locked
from undiffuse.training.trainer import TrainResult, fit

__all__ = [
    "Checkpoint",
    "TrainConfig",
    "TrainResult",
    "World",
    "find_device",
    "fit",
    "join",
    "list_checkpoints",
    "load_checkpoint",
    "locked",
    "rank_and_size",
    "rebuild",
    "save_checkpoint",
]
