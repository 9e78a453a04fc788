"""The networks: nine U-Net variants, their locality, their checkpoints."""

from tilepipe.models.checkpoint import read_header, save_checkpoint
from tilepipe.models.locality import Locality, check_halo
from tilepipe.models.model import (
    Model,
    from_module,
    from_net,
    load_model,
    locality_of,
    model_for,
)
from tilepipe.models.net import InferenceNet, Net, TrainingOutput
from tilepipe.models.normalisation import Normalisation
from tilepipe.models.registry import ARCHITECTURES, build, parameters_of

__all__ = [
    "ARCHITECTURES",
    "InferenceNet",
    "Locality",
    "Model",
    "Net",
    "Normalisation",
    "TrainingOutput",
    "build",
    "check_halo",
    "from_module",
    "from_net",
    "load_model",
    "locality_of",
    "model_for",
    "parameters_of",
    "read_header",
    "save_checkpoint",
]
