import subprocess
import sys

import sae


def test_public_surface_is_pinned() -> None:
    assert sae.__all__ == [
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
    assert all(hasattr(sae, name) for name in sae.__all__)


def test_import_needs_torch_numpy_safetensors_and_jaxtyping_only() -> None:
    foreign = (
        *("pyarrow", "transformers", "ray", "zarr", "pydantic", "scipy", "pandas", "rich", "jinja2"),
        *("storage", "pipelines"),
    )
    code = f"import sae, sys; found = [m for m in {foreign} if m in sys.modules]; sys.exit(str(found) if found else 0)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
