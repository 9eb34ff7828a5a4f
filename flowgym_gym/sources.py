"""Where checkpoints and weights are: a folder or file on this machine, or a repository of the Hub."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Source:
    """Weights that were found.

    Attributes:
        name: Absolute path, or Hub id.
        local: Whether it is on this machine; then the network is never touched.
        file: Whether it is a single file, which is always local.
    """

    name: str
    local: bool
    file: bool = False

    def __str__(self) -> str:
        if self.file:
            return f"checkpoint file {self.name!r}"
        return f"checkpoint folder {self.name!r}" if self.local else f"Hub id {self.name!r}"
