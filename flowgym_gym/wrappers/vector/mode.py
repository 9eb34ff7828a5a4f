"""What Gymnasium's vector wrappers lack."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from gymnasium.vector import AutoresetMode, VectorActionWrapper, VectorWrapper

# Gymnasium's vector wrappers take type arguments from 1.4 on; where types are checked they have
# them.
if TYPE_CHECKING:
    Wrapper = VectorWrapper[Any, Any, Any, Any, Any]
    ActionWrapper = VectorActionWrapper[Any, np.ndarray, np.ndarray, np.ndarray]
else:
    Wrapper, ActionWrapper = VectorWrapper, VectorActionWrapper


class KnowsAutoresetMode:
    """Shows the autoreset mode as an attribute, which Gymnasium's vector wrappers keep in their
    metadata only.
    """

    metadata: Any

    @property
    def autoreset_mode(self) -> AutoresetMode:
        """When ended episodes are reset."""
        mode: AutoresetMode = self.metadata["autoreset_mode"]
        return mode
