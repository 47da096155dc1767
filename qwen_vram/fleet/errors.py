"""The error for a wish that no fleet fulfils."""

from __future__ import annotations

from qwen_vram.errors import QwenVramError
from qwen_vram.fleet.simulation.service import Wish


class WishNotMetError(QwenVramError):
    """No fleet of the named GPUs gives enough requests the wished service.

    Attributes:
        wish: What was asked for.
        nearest: The nearest wish that a fleet of these GPUs fulfils for all users.
        users: The most users for whom that fleet fulfils the wish itself; 0 for no users.
        gpu, weights, tensor_parallel, replicas: That fleet; `replicas` is 0 if it is any number, with no load.
    """

    def __init__(
        self,
        message: str,
        *,
        wish: Wish,
        nearest: Wish,
        gpu: str,
        weights: str,
        tensor_parallel: int,
        replicas: int,
        users: int,
    ) -> None:
        super().__init__(message)
        self.wish = wish
        self.nearest = nearest
        self.gpu = gpu
        self.weights = weights
        self.tensor_parallel = tensor_parallel
        self.replicas = replicas
        self.users = users
