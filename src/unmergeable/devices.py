"""Where networks compute: on a GPU where torch has one, otherwise on the processor.

``CUDA_VISIBLE_DEVICES`` says which GPU, or with an empty value none, as for every program that uses torch.
"""

from __future__ import annotations

import os

import torch

VISIBLE = "CUDA_VISIBLE_DEVICES"


def network_device() -> torch.device:
    """The device that a network is moved to before it is trained or scored."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def count_gpus() -> int:
    """How many GPUs torch sees."""
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def see_one_gpu(number: int, gpus: int) -> None:
    """Leave this process one of the GPUs that its parent saw; before torch looks for any.

    Args:
        number: of the process, from 0.
        gpus: how many the parent saw; 0 changes nothing.
    """
    if gpus:
        named = os.environ.get(VISIBLE, "").split(",")
        names = named if len(named) >= gpus and named[0] else [str(gpu) for gpu in range(gpus)]
        os.environ[VISIBLE] = names[number % gpus].strip()
