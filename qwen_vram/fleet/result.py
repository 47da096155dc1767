"""The result: the fleets that fulfil the wish, as text, commands and files."""

from __future__ import annotations

from dataclasses import dataclass

from qwen_vram.fleet.command import ServerCommand, check_vllm, commands
from qwen_vram.fleet.data import Fleet


@dataclass(frozen=True, kw_only=True)
class FleetPlan(Fleet):
    """Fleets for a number of users, the best first; the attributes are those of `Fleet`."""

    def commands(self, option: int = 0) -> list[ServerCommand]:
        """Return the command of each server, with its machine, its GPUs and its port.

        Args:
            option: The number of the option in `options`.

        Raises:
            NotSupportedError: the model is a config, so that there is nothing to serve.
        """
        return commands(self, self.options[option])

    def vllm_commands(self, option: int = 0) -> list[ServerCommand]:
        """Return `commands` of an engine that is vLLM.

        Raises:
            NotSupportedError: the engine is another one, or the model is a config.
        """
        check_vllm(self.engine)
        return self.commands(option)

    def compose(self, option: int = 0, *, node: int = 0, image: str | None = None) -> str:
        """Return a Docker Compose file for one machine of an option.

        Args:
            option: As for `commands`.
            node: The number of the machine.
            image: The image of the engine, with its tag; `None` is the version that this plan knows.

        Raises:
            BackendUnavailableError: PyYAML is not installed.
            NotSupportedError, WorkloadError: a model or a machine that there is not.
        """
        from qwen_vram.fleet.manifests import compose

        return compose(self, self.options[option], node=node, image=image)

    def kubernetes(self, option: int = 0, *, image: str | None = None, name: str | None = None) -> str:
        """Return a Kubernetes Deployment and a Service of an option.

        Args:
            option, image: As for `compose`.
            name: The name of both; `None` is made of the model's.

        Raises:
            BackendUnavailableError: PyYAML is not installed.
            NotSupportedError, WorkloadError: a model that cannot be served, or a name that Kubernetes does not allow.
        """
        from qwen_vram.fleet.manifests import kubernetes

        return kubernetes(self, self.options[option], image=image, name=name)

    def __str__(self) -> str:
        """The options as a table of at most 80 columns, the memory of a card of the best, and the notes."""
        from qwen_vram.fleet.text import text

        return text(self)
