"""Which device computes where none is configured."""

import torch


def best_device() -> torch.device:
    """As `trainer.accelerator: auto` chooses for training: a CUDA GPU, else Apple's, else the
    CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
