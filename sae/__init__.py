"""Sparse autoencoders for language-model activations: train, load, encode, splice, intervene. Pure PyTorch."""

from sae.architectures import build
from sae.base import SAE, SAEOutput, SparseLatents
from sae.batchtopk import BatchTopKSAE
from sae.checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint
from sae.config import BatchTopKConfig, JumpReLUConfig, SAEConfig, TopKConfig, config_from_dict
from sae.dictionary import Dictionary
from sae.hooks import Edit, Tap, attach, find_module, replace_activations
from sae.jumprelu import JumpReLUSAE
from sae.metrics import FVU, L0, ActivationFrequency
from sae.topk import TopKSAE
from sae.trainer import StepMetrics, StopTraining, Trainer, TrainerConfig

__all__ = [
    "FVU",
    "L0",
    "SAE",
    "ActivationFrequency",
    "BatchTopKConfig",
    "BatchTopKSAE",
    "Dictionary",
    "Edit",
    "JumpReLUConfig",
    "JumpReLUSAE",
    "SAEConfig",
    "SAEOutput",
    "SparseLatents",
    "StepMetrics",
    "StopTraining",
    "Tap",
    "TopKConfig",
    "TopKSAE",
    "Trainer",
    "TrainerConfig",
    "attach",
    "build",
    "config_from_dict",
    "find_module",
    "latest_checkpoint",
    "load_checkpoint",
    "replace_activations",
    "save_checkpoint",
]
