"""What loops that are not Gymnasium's own read of a vector environment."""

from __future__ import annotations

from typing import Any

from gymnasium.vector import AutoresetMode


class KnowsAutoresetMode:
    """Shows the autoreset mode as an attribute, which Gymnasium's vector wrappers keep in their metadata only."""

    metadata: Any

    @property
    def autoreset_mode(self) -> AutoresetMode:
        """When ended episodes are reset."""
        mode: AutoresetMode = self.metadata["autoreset_mode"]
        return mode
