"""Base models: the pre-trained diffusion and flow models that environments steer."""

from flowgym_gym.models.base import BaseModel
from flowgym_gym.models.loading import clear_model_cache, from_pipeline, from_pretrained

__all__ = ["BaseModel", "clear_model_cache", "from_pipeline", "from_pretrained"]
