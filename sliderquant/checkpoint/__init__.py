"""Checkpoints on disk: writing, reading, verifying. `sliderquant.loading` makes a model of one."""

from sliderquant.checkpoint.card import CardInfo
from sliderquant.checkpoint.describing import Description, describe
from sliderquant.checkpoint.reader import Checkpoint, read_checkpoint
from sliderquant.checkpoint.verifying import Verification, verify
from sliderquant.checkpoint.writer import CheckpointWriter

__all__ = [
    "CardInfo",
    "Checkpoint",
    "CheckpointWriter",
    "Description",
    "Verification",
    "describe",
    "read_checkpoint",
    "verify",
]
