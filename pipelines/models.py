"""Language models: where they come from, and forward passes that stop at the last hook.

A GGUF file is dequantised once into a Hugging Face folder and kept in a cache named by the file's digest; ids and
folders are used as they are. Nothing here trains or changes a model.
"""

import hashlib
import json
import os
import shutil
import uuid
import warnings
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from pipelines.config import ModelConfig
from pipelines.errors import UsageError
from pipelines.sources import PACKAGE_SCHEME, locate, sha256_of
from sae.hooks import replace_activations


@dataclass(frozen=True)
class ResolvedModel:
    """A model on this machine, and its provenance."""

    folder: Path
    """Hugging Face folder: config.json, safetensors, tokenizer."""
    source: str
    weights_sha256: str
    """Digest of the original weights (the GGUF file, or all safetensors files in name order)."""
    settings_sha256: str
    """Digest of config.json and of the folder's own Python code: what else decides the activations."""
    tokenizer_sha256: str
    revision: str | None

    def provenance(self) -> dict[str, Any]:
        """What the store's fingerprint records: the source as the config gives it, not where it was found."""
        return {
            "source": self.source,
            "revision": self.revision,
            "weights_sha256": self.weights_sha256,
            "settings_sha256": self.settings_sha256,
            "tokenizer_sha256": self.tokenizer_sha256,
        }


def cache_root() -> Path:
    """Folder for converted models: `SAE_PIPELINES_CACHE`, else the user's cache folder."""
    default = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "sae-pipelines"
    return Path(os.environ.get("SAE_PIPELINES_CACHE", default))


def resolve_model(config: ModelConfig) -> ResolvedModel:
    """Find the model's folder, converting or downloading it when needed.

    Raises:
        UsageError: no such model; the message says what to do.
    """
    source = config.source
    if source.startswith(PACKAGE_SCHEME) or source.endswith(".gguf"):
        file = locate(source, sha256=config.sha256)
        digest = config.sha256 or sha256_of(file)
        folder = _converted(file, digest)
        revision = None
    else:
        if config.sha256 is not None:
            raise UsageError(
                "model.sha256 is for single-file sources (.gguf); pin a Hugging Face model with model.revision"
            )
        folder, revision = _hub_folder(config)
        weights = sorted(folder.glob("*.safetensors"))
        if not weights:
            raise UsageError(
                f"model {source}: {folder} has no .safetensors file; pickled weights are not loaded, convert them first"
            )
        digest = sha256_of(weights[0]) if len(weights) == 1 else _joint_digest(weights)
    tokenizer = folder / "tokenizer.json"
    if not tokenizer.is_file():
        raise UsageError(f"model {source}: {folder} has no tokenizer.json; a fast tokenizer is needed")
    return ResolvedModel(folder, source, digest, _settings_digest(folder), sha256_of(tokenizer), revision)


def resolve_settings(config: ModelConfig) -> ResolvedModel:
    """As `resolve_model`, but only as far as the model's config.json: no weights are fetched, read or hashed.

    The digests are empty. A GGUF file that was not converted yet is converted, since its settings are inside of it.

    Raises:
        UsageError: no such model.
    """
    if config.source.startswith(PACKAGE_SCHEME) or config.source.endswith(".gguf"):
        return resolve_model(config)
    folder, revision = _hub_folder(config, weights=False)
    return ResolvedModel(folder, config.source, "", "", "", revision)


def _settings_digest(folder: Path) -> str:
    """Equal for folders that describe the same network: who saved config.json, and with which version, is left out."""
    file = folder / "config.json"
    try:
        settings = {
            key: value
            for key, value in json.loads(file.read_text(encoding="utf-8")).items()
            if key not in ("transformers_version", "_name_or_path")
        }
    except (ValueError, AttributeError):  # transformers will say what is wrong with it
        settings = {"config.json": sha256_of(file)}
    code = {file.name: sha256_of(file) for file in sorted(folder.glob("*.py"))}
    return hashlib.sha256(json.dumps([settings, code], sort_keys=True).encode()).hexdigest()


def _joint_digest(files: Sequence[Path]) -> str:
    return hashlib.sha256("".join(sha256_of(file) for file in files).encode()).hexdigest()


def _hub_folder(config: ModelConfig, *, weights: bool = True) -> tuple[Path, str | None]:
    local = Path(config.source).expanduser()
    if local.is_dir():
        if not (local / "config.json").is_file():
            raise UsageError(f"model {config.source}: the folder has no config.json; give a Hugging Face model folder")
        return local, None
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        folder = snapshot_download(
            config.source,
            revision=config.revision,
            allow_patterns=["*.json", "*.txt", "*.model", "*.jinja"]
            + (["*.safetensors"] if weights else [])
            + (["*.py"] if config.trust_remote_code else []),
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UsageError(
            f"model {config.source!r} is neither a folder here nor could it be fetched from the Hugging Face "
            f"Hub ({reason}); "
            "check the name, the network and, for a gated model, HF_TOKEN"
        ) from error
    return Path(folder), Path(folder).name  # a snapshot folder is named by its commit


def _converted(file: Path, digest: str) -> Path:
    """The dequantised folder of a GGUF file, made when it is not there yet."""
    folder = cache_root() / "models" / f"{file.stem}-{digest[:12]}"
    if (folder / "config.json").is_file():
        return folder
    try:
        import accelerate  # noqa: F401
        import gguf  # noqa: F401
    except ImportError as error:
        raise UsageError(f"{file.name} is a GGUF file: pip install 'sae-pipelines[gguf]'") from error
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    unfinished = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}.partial")
    unfinished.mkdir(parents=True)
    try:
        with warnings.catch_warnings(), _quiet_transformers():
            warnings.simplefilter("ignore")
            where = str(file.parent)
            AutoTokenizer.from_pretrained(where, gguf_file=file.name).save_pretrained(unfinished)
            model = AutoModelForCausalLM.from_pretrained(
                where, gguf_file=file.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16
            )
            model.save_pretrained(unfinished)
        try:
            unfinished.rename(folder)
        except OSError:  # another process was faster
            if not (folder / "config.json").is_file():
                raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return folder


class _quiet_transformers:
    """No progress bars and no advice from transformers inside the block."""

    def __enter__(self) -> None:
        from transformers.utils import logging

        self._verbosity = logging.get_verbosity()
        self._bars = logging.is_progress_bar_enabled()
        logging.set_verbosity_error()
        logging.disable_progress_bar()

    def __exit__(self, *_: object) -> None:
        from transformers.utils import logging

        logging.set_verbosity(self._verbosity)
        if self._bars:
            logging.enable_progress_bar()


def load_tokenizer(resolved: ResolvedModel, trust_remote_code: bool = False) -> Any:
    """The model's fast tokenizer.

    Raises:
        UsageError: its files cannot be read.
    """
    from transformers import AutoTokenizer

    with _quiet_transformers():
        try:
            return AutoTokenizer.from_pretrained(resolved.folder, trust_remote_code=trust_remote_code)
        except Exception as error:
            raise unusable(resolved, error) from error


def pick_device(device: str) -> torch.device:
    """`auto` is a GPU where there is one.

    Raises:
        UsageError: no such device.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(f"model.device {device!r} cannot be used here ({reason}): use auto, cpu or cuda") from error


def forward_dtype(wanted: str, device: torch.device) -> torch.dtype:
    """The arithmetic of a forward pass: `wanted`, or float32 on a CPU without instructions for it.

    Such a CPU emulates bfloat16 and float16, sixty times slower than it computes in float32. Weights are exact in
    float32, captured activations are rounded to `wanted`, and each commit says which arithmetic it was.
    """
    if device.type != "cpu" or wanted == "float32":
        return getattr(torch, wanted)  # type: ignore[no-any-return]
    probe = {"bfloat16": "_is_mkldnn_bf16_supported", "float16": "_is_mkldnn_fp16_supported"}[wanted]
    native = hasattr(torch.ops.mkldnn, probe) and bool(getattr(torch.ops.mkldnn, probe)())
    return getattr(torch, wanted) if native else torch.float32


def unusable(resolved: ResolvedModel, error: Exception) -> UsageError:
    """What to tell the user when transformers refuses a model folder."""
    if "trust_remote_code" in str(error):
        return UsageError(
            f"model {resolved.source} ships Python code of its own; read it, then set model.trust_remote_code: true to "
            "run it"
        )
    return UsageError(f"model {resolved.source} cannot be loaded: {error}")


class _AllCaptured(Exception):
    """Ends a forward pass once every hook has been seen."""


class LanguageModel:
    """A causal language model in evaluation mode, with its tokenizer."""

    def __init__(self, resolved: ResolvedModel, config: ModelConfig) -> None:
        from transformers import AutoModelForCausalLM

        self.resolved = resolved
        self.device = pick_device(config.device)
        self._dtype: torch.dtype = getattr(torch, config.dtype)
        with _quiet_transformers():
            try:
                model = AutoModelForCausalLM.from_pretrained(
                    resolved.folder,
                    dtype=forward_dtype(config.dtype, self.device),
                    attn_implementation="sdpa",
                    trust_remote_code=config.trust_remote_code,
                    use_safetensors=True,
                )
            except (ValueError, OSError) as error:
                raise unusable(resolved, error) from error
        # transformers has no types here; what is used of it is the plain module and its Hugging Face methods.
        self.model: Any = model.to(self.device).eval().requires_grad_(False)
        self.tokenizer = load_tokenizer(resolved, config.trust_remote_code)

    @property
    def model_id(self) -> str:
        """The source as the config gives it."""
        return self.resolved.source

    @torch.inference_mode()
    def capture(
        self, tokens: Int[Tensor, "batch seq"], position: Int[Tensor, "batch seq"], hook_names: Sequence[str]
    ) -> dict[str, Float[Tensor, "batch seq d_in"]]:
        """Activations at the hooks in the config's dtype; layers after the last hook and the head are not run."""
        captured: dict[str, Tensor] = {}

        def keep(name: str, x: Tensor) -> None:
            captured[name] = x.to(self._dtype)
            if len(captured) == len(hook_names):
                raise _AllCaptured

        with ExitStack() as stack:
            for name in hook_names:
                try:
                    stack.enter_context(replace_activations(self.model, name, partial(keep, name)))
                except ValueError as error:
                    raise UsageError(f"model {self.model_id}: {error}") from error
            stack.enter_context(suppress(_AllCaptured))
            self.model(input_ids=tokens, position_ids=position, use_cache=False)
        missing = [name for name in hook_names if name not in captured]
        if missing:
            raise UsageError(
                f"model {self.model_id}: the forward pass never reached {missing}; choose modules that text "
                "passes through"
            )
        return captured

    def check_isolation(self, hook_name: str) -> None:
        """Make sure that restarting positions keep documents apart in this model.

        Raises:
            UsageError: a second document's activations depend on the first.
        """
        generator = torch.Generator().manual_seed(0)
        vocab = int(self.model.get_input_embeddings().weight.shape[0])
        first, other, second = torch.randint(vocab, (3, 1, 12), generator=generator)
        position = torch.arange(12)
        joint = torch.cat([position, position])[None].to(self.device)
        a, b = (
            self.capture(torch.cat([lead, second], dim=1).to(self.device), joint, [hook_name])[hook_name][
                0, 12:
            ].float()
            for lead in (first, other)
        )
        if not torch.allclose(a, b, rtol=0.02, atol=0.02 * float(a.abs().max())):
            raise UsageError(
                f"model {self.model_id} does not keep packed documents apart (largest difference "
                f"{float((a - b).abs().max()):.3g}): "
                "set collect.isolate_documents: false, and read labels and audits with that in mind"
            )

    def token_strings(self) -> list[str]:
        """Readable text of every token id."""
        ids = range(int(self.model.get_input_embeddings().weight.shape[0]))
        raw = self.tokenizer.convert_ids_to_tokens(list(ids))
        # SentencePiece marks a leading space with "▁", which converting a lone token would drop.
        lead = [" " if token is not None and token.startswith("▁") else "" for token in raw]
        texts = ["" if token is None else self.tokenizer.convert_tokens_to_string([token]) for token in raw]
        return [space + text.removeprefix(" ") if space else text for space, text in zip(lead, texts, strict=True)]

    def unembedding(self) -> tuple[Float[Tensor, " d_in"], Float[Tensor, "d_in vocab"]]:
        """Weight of the final norm and the output matrix, fp32: logits ≈ (norm(x) * weight) @ W_U."""
        head = self.model.get_output_embeddings().weight.detach().float()
        base: Any = getattr(self.model, self.model.base_model_prefix)
        norm = next((getattr(base, name) for name in ("norm", "ln_f", "final_layer_norm") if hasattr(base, name)), None)
        if norm is None or getattr(norm, "weight", None) is None:
            weight = torch.ones(head.shape[1])
        else:
            weight = norm.weight.detach().float().cpu()
            if "Gemma" in type(norm).__name__:  # Gemma's norms multiply by 1 + weight
                weight = weight + 1
        return weight, head.T.cpu()


def language_model_of(run: str | os.PathLike[str]) -> LanguageModel:
    """The language model of a run directory, as its config names it."""
    from pipelines.configio import load_config

    config = load_config(Path(run) / "config.yaml").model
    return LanguageModel(resolve_model(config), config)
