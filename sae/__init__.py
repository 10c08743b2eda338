"""Sparse autoencoders for language-model activations: train, load, encode, splice, intervene. Pure PyTorch."""

from sae.architectures import build
from sae.attribution import Effects, attribute, exact_effects
from sae.base import SAE, SAEOutput, SparseLatents
from sae.batchtopk import BatchTopKSAE
from sae.check import CheckReport, check
from sae.checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint
from sae.config import (
    BatchTopKConfig,
    CrosscoderConfig,
    GatedConfig,
    JumpReLUConfig,
    MatryoshkaBatchTopKConfig,
    SAEConfig,
    StandardConfig,
    TopKConfig,
    TranscoderConfig,
    config_from_dict,
)
from sae.crosscoder import Crosscoder
from sae.dictionary import Dictionary
from sae.edits import Add, Clamp, Edit, Exclude, Mean, Patch, Scale, Zero
from sae.gated import GatedSAE
from sae.hooks import replace_activations
from sae.jumprelu import JumpReLUSAE
from sae.matryoshka_batchtopk import MatryoshkaBatchTopKSAE
from sae.metrics import FVU, L0, ActivationFrequency
from sae.naming import find_hook, from_transformer_lens, to_transformer_lens
from sae.normalise import Normaliser, fit_normaliser
from sae.standard import StandardSAE
from sae.tapping import Tap, attach
from sae.topk import TopKSAE
from sae.trainer import StepMetrics, StopTraining, Trainer, TrainerConfig
from sae.transcoder import Transcoder

__all__ = [
    "FVU",
    "L0",
    "SAE",
    "ActivationFrequency",
    "Add",
    "BatchTopKConfig",
    "BatchTopKSAE",
    "CheckReport",
    "Clamp",
    "Crosscoder",
    "CrosscoderConfig",
    "Dictionary",
    "Edit",
    "Effects",
    "Exclude",
    "GatedConfig",
    "GatedSAE",
    "JumpReLUConfig",
    "JumpReLUSAE",
    "MatryoshkaBatchTopKConfig",
    "MatryoshkaBatchTopKSAE",
    "Mean",
    "Normaliser",
    "Patch",
    "SAEConfig",
    "SAEOutput",
    "Scale",
    "SparseLatents",
    "StandardConfig",
    "StandardSAE",
    "StepMetrics",
    "StopTraining",
    "Tap",
    "TopKConfig",
    "TopKSAE",
    "Trainer",
    "TrainerConfig",
    "Transcoder",
    "TranscoderConfig",
    "Zero",
    "attach",
    "attribute",
    "build",
    "check",
    "config_from_dict",
    "exact_effects",
    "find_hook",
    "fit_normaliser",
    "from_transformer_lens",
    "latest_checkpoint",
    "load_checkpoint",
    "replace_activations",
    "save_checkpoint",
    "to_transformer_lens",
]
