"""What a file gives back."""

import io

import torch


def through_a_file(thing, weights_only=True):
    """What `torch.load` gives of what `torch.save` wrote."""
    file = io.BytesIO()
    torch.save(thing, file)
    file.seek(0)
    return torch.load(file, weights_only=weights_only)
