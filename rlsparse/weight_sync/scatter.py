"""Changes of a receiver, into live weights where they are."""

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray

from rlsparse.errors import PatchError
from rlsparse.tensor_file import Bits
from rlsparse.weight_sync.anchors import HostTensor
from rlsparse.weight_sync.live import DTYPES, INTEGERS, SIGNED


class scatter:
    """What a ``PatchReceiver`` calls so that weights on any device follow it, bit for bit.

    Positions and bits alone go to the device. Nothing waits for what reads the weights there
    meanwhile: stop it first.

    Args:
        parameters: name -> contiguous weights in the format that is served, such as
            ``dict(model.named_parameters())``; tied ones under one name.
    """

    def __init__(self, parameters: Mapping[str, torch.Tensor]) -> None:
        self._parameters = parameters

    def check(self, tensors: Mapping[str, HostTensor]) -> None:
        """Refuse weights that are not those of a receiver; nothing is written.

        Raises:
            PatchError: one is missing, of another format or shape, or not contiguous.
        """
        for name, tensor in tensors.items():
            weight = self._parameters.get(name)
            if weight is None:
                here = "not there"
            elif (DTYPES.get(weight.dtype), tuple(weight.shape)) != (tensor.dtype, tensor.shape):
                here = f"{weight.dtype} {list(weight.shape)}"
            elif not weight.is_contiguous():
                here = "not contiguous"
            else:
                continue
            raise PatchError(
                f"{name} is served as {tensor.dtype} {list(tensor.shape)}, here it is {here}: give "
                "all weights under the names, in the format and in the shapes that the "
                "PatchWriter serves"
            )

    def __call__(self, name: str, positions: NDArray[np.int64], bits: Bits) -> None:
        """Write some bits of a tensor that ``check`` has seen."""
        weight = self._parameters[name]
        flat = weight.detach().view(-1).view(INTEGERS[weight.dtype])
        places = torch.from_numpy(positions).to(flat.device)
        values = torch.from_numpy(bits.view(SIGNED[bits.dtype])).to(flat.device)
        flat.index_copy_(0, places, values)
