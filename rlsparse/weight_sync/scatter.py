"""Changes of a receiver, into live weights where they are."""

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray

from rlsparse.errors import PatchError
from rlsparse.tensor_file import Bits
from rlsparse.weight_sync.live import INTEGERS, SIGNED
from rlsparse.weight_sync.receiver import OnChange


def scatter(parameters: Mapping[str, torch.Tensor]) -> OnChange:
    """What a ``PatchReceiver`` calls so that weights on any device follow it, bit for bit.

    Positions and bits alone go to the device. Nothing waits for what reads the weights there
    meanwhile: stop it first.

    Args:
        parameters: name -> contiguous weights in the format that is served, such as
            ``dict(model.named_parameters())``; tied ones under one name.

    Returns:
        A function that raises PatchError where a name is unknown, or of another format.
    """

    def on_change(name: str, positions: NDArray[np.int64], bits: Bits) -> None:
        weight = parameters.get(name)
        if weight is None or weight.dtype.itemsize != bits.itemsize:
            kind = f"{weight.dtype}" if weight is not None else "not there"
            raise PatchError(
                f"{name} comes as {bits.itemsize} bytes per weight, here it is {kind}: give the "
                "weights under the names and in the format that the PatchWriter serves"
            )
        flat = weight.detach().view(-1).view(INTEGERS[weight.dtype])
        places = torch.from_numpy(positions).to(flat.device)
        values = torch.from_numpy(bits.view(SIGNED[bits.dtype])).to(flat.device)
        flat.index_copy_(0, places, values)

    return on_change
