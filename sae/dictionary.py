"""Dictionary: a trained SAE with what is known about it, in one folder that SAELens reads too.

`sae.folder` describes the folder and reads and writes it; `sae.interop` reads those of other tools.
"""

import builtins
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from safetensors.torch import load_file
from torch import Tensor

from sae import folder as folders
from sae import search as searching
from sae.base import SAE, SparseLatents
from sae.config import SAEConfig
from sae.crosscoder import Crosscoder
from sae.edits import Edit, Exclude, Excluded
from sae.interop.saelens import SPARSITY
from sae.matching import Matching, match
from sae.search import Found, Neighbour
from sae.showing import Shown, Text, show
from sae.slicing import encode_latents, latent_index
from sae.tapping import Tap, attach
from sae.transcoder import Transcoder


@runtime_checkable
class Resolver(Protocol):
    """Turns names that are no local folder, Hub ids and URLs, into local folders."""

    def fetch(self, name: str, *, subfolder: str | None, revision: str | None, token: str | None) -> Path:
        """The folder of one dictionary, fetched if need be. Raises: FileNotFoundError if there is none."""

    def list(self, name: str, *, revision: str | None, token: str | None) -> list[str]:
        """The subfolders that hold dictionaries, without fetching them."""


class Dictionary:
    """A trained SAE, where it belongs in a language model, and its provenance, metrics and feature table.

    `encode` and `decode` run without gradients; use `dictionary.sae` for differentiable calls. Results have the device
    and dtype of the SAE's weights; inputs may have any float dtype.

    Args:
        hook_name: the module whose activations the SAE reads, such as "model.layers.8".
        hook_names: for an SAE of several hooks, one for each tensor of its training batches: a transcoder's input and
            target, a crosscoder's sources. By default `hook_name` alone.
        metadata: written to cfg.json under `metadata`, where SAELens looks for model_name, context_size, dataset_path
            and prepend_bos.
    """

    _resolver: ClassVar[Resolver | None] = None

    def __init__(
        self,
        sae: SAE,
        *,
        hook_name: str | None = None,
        hook_names: Sequence[str] | None = None,
        metadata: Mapping[str, Any] | None = None,
        provenance: Mapping[str, Any] | None = None,
        metrics: Mapping[str, Any] | None = None,
        path: Path | None = None,
    ) -> None:
        self.sae = sae
        self.hook_names = tuple(hook_names or ([] if hook_name is None else [hook_name]))
        self.hook_name = self.hook_names[0] if self.hook_names else None
        self.metadata = dict(metadata or {})
        self.provenance = dict(provenance or {})
        self.metrics = dict(metrics or {})
        self.path = path

    # ---- what it is -----------------------------------------------------------------------------------------------

    @property
    def required_hook_name(self) -> str:
        """`hook_name`. Raises: ValueError if this dictionary does not record it."""
        if self.hook_name is None:
            raise ValueError("This dictionary does not record its hook. Pass `hook_name`, such as 'model.layers.8'.")
        return self.hook_name

    @property
    def input_hooks(self) -> tuple[str, ...]:
        """The hooks whose activations `encode` takes, joined: one, but for a crosscoder."""
        return self.hook_names if isinstance(self.sae, Crosscoder) else self.hook_names[:1]

    @property
    def output_hooks(self) -> tuple[str, ...]:
        """The hooks that are reconstructed: those of the input, but for a transcoder."""
        return self.hook_names[1:] if isinstance(self.sae, Transcoder) else self.input_hooks

    @property
    def config(self) -> SAEConfig:
        return self.sae.config

    @property
    def d_in(self) -> int:
        return self.sae.d_in

    @property
    def d_sae(self) -> int:
        return self.sae.d_sae

    @property
    def W_dec(self) -> Float[Tensor, "d_sae d_in"]:
        """The decoder directions, one row per latent, without gradient."""
        return self.sae.W_dec.detach()

    @cached_property
    def features(self) -> Any:
        """The pyarrow Table of features.parquet, read on first use; None if the folder has none. Needs pyarrow."""
        file = None if self.path is None else self.path / folders.FEATURES
        if file is None or not file.exists():
            return None
        import pyarrow.parquet

        return pyarrow.parquet.read_table(file)

    @cached_property
    def features_frame(self) -> Any:
        """`features` as a pandas DataFrame; None if the folder has none. Needs pandas."""
        return None if self.features is None else self.features.to_pandas()

    @cached_property
    def log10_frequency(self) -> Float[Tensor, " d_sae"] | None:
        """log10 of the share of tokens on which each latent fires; None if it was not recorded."""
        if self.path is None or not (self.path / SPARSITY).exists():
            return None
        tensors: dict[str, Tensor] = load_file(self.path / SPARSITY)
        return tensors["sparsity"]

    # ---- what it does ---------------------------------------------------------------------------------------------

    @torch.no_grad()
    def encode(
        self, x: Float[Tensor, "*batch d_in"], latents: Sequence[int] | Int[Tensor, " n"] | slice | None = None
    ) -> Float[Tensor, "*batch n_latents"]:
        """Latent activations of `x`.

        Args:
            latents: only these, in this order; the others are not computed unless the rule is TopK, under which a
                latent depends on all of them.
        Raises: ValueError if `x` has another width, or a latent does not exist.
        """
        if latents is None:
            return self.sae.encode(x)
        return encode_latents(self.sae, x, latent_index(latents, self.d_sae))

    @torch.no_grad()
    def encode_sparse(self, x: Float[Tensor, "*batch d_in"]) -> SparseLatents:
        """The nonzero latent activations, in row-major order; rows are tokens, leading dimensions flattened.

        Exactly the nonzeros of `encode`; `SparseLatents.per_token` gives the same as a padded table. Memory beyond the
        result does not grow with the number of tokens.
        """
        W_enc = self.sae.W_enc
        if W_enc.is_contiguous() and not W_enc.t().is_contiguous():
            W_enc.data = W_enc.data.t().contiguous().t()  # latent by latent, as the sparse kernels read it; once
        return self.sae.encode_sparse(x.reshape(-1, x.shape[-1]))

    @torch.no_grad()
    def decode(
        self, latent_acts: Float[Tensor, "*batch d_sae"], x: Float[Tensor, "*batch d_in"] | None = None
    ) -> Float[Tensor, "*batch d_out"]:
        """Reconstruction from latent activations; see `SAE.decode` for `x`, which few dictionaries need."""
        return self.sae.decode(latent_acts, x)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> "Dictionary":
        """Move the SAE, in place, and return self."""
        self.sae.to(device=device, dtype=dtype)
        return self

    # ---- finding latents ------------------------------------------------------------------------------------------

    def nearest(self, direction: Float[Tensor, " d_out"], n: int = 10) -> builtins.list[Neighbour]:
        """The n latents whose decoder directions have the largest cosine with `direction`; see `sae.search`."""
        return searching.nearest(self.W_dec, direction, n)

    def similar(self, latent: int, n: int = 10) -> builtins.list[Neighbour]:
        """The n other latents whose decoder directions are closest to that of `latent`."""
        (index,) = latent_index([latent], self.d_sae).tolist()
        found = searching.nearest(self.W_dec, self.W_dec[index], n + 1)
        return [neighbour for neighbour in found if neighbour.latent != index][:n]

    def search(self, query: str, n: int = 10) -> builtins.list[Found]:
        """The n latents whose labels hold most of the query's words; see `sae.search`.

        Raises: ValueError if the dictionary has no feature table, or one without labels.
        """
        if self.features is None:
            raise ValueError(
                f"Only a labelled dictionary can be searched, but there is no {folders.FEATURES} in {self.path}. "
                "Label it first: `sae label`."
            )
        return searching.search(self.features, query, n)

    def match(
        self,
        other: "Dictionary",
        activations: Iterable[Float[Tensor, "_ d_in"]] | None = None,
        *,
        by: Literal["cosine", "correlation"] = "cosine",
    ) -> Matching:
        """Match latents one to one with those of another dictionary of the same hook; see `sae.matching`.

        Args:
            activations: batches of tokens; with them the correlation of each pair's activations is reported too.
            by: what the matching maximises the sum of.
        Raises: ValueError if the two write to spaces of other widths. Needs scipy.
        """
        return match(self, other, activations, by)

    # ---- in a model ---------------------------------------------------------------------------------------------

    @property
    def sinks(self) -> Exclude:
        """The tokens that training left out, for `attach(exclude=…)`: first positions and outliers by norm.

        The limit is the recorded multiple of the recorded median norm; first positions alone where they are not known.
        """
        multiple, median = self.provenance.get("sink_multiple"), self.provenance.get("median_norm")
        return Exclude(max_norm=None if multiple is None or median is None else float(multiple) * float(median))

    def attach(
        self,
        model: Any,
        *,
        splice: bool = False,
        error: Literal["drop", "keep"] = "drop",
        edits: Sequence[Edit] = (),
        exclude: Excluded = None,
        grad: bool = False,
        hook_name: str | None = None,
    ) -> AbstractContextManager[Tap]:
        """Read, splice or edit at this dictionary's hook while a `with` block lasts; see `sae.attach`.

        A transcoder reads at its first hook and replaces what its second gives; a crosscoder can only be read.

        Args:
            hook_name: attach here instead; an SAE of one hook only.
        """
        if hook_name is not None and len(self.hook_names) > 1:
            raise ValueError(
                f"`hook_name` moves an SAE of one hook, but this {self.config.architecture} has "
                f"{', '.join(self.hook_names)}. Leave it out."
            )
        return attach(
            model,
            self.sae,
            hook_name or (self.required_hook_name if len(self.input_hooks) < 2 else self.input_hooks),
            splice=splice,
            error=error,
            edits=edits,
            exclude=exclude,
            grad=grad,
            output_hook=self.output_hooks[0] if isinstance(self.sae, Transcoder) and self.output_hooks else None,
        )

    def show(
        self,
        text: Text,
        model: Any,
        tokenizer: Any = None,
        *,
        n: int = 3,
        labelled: bool = False,
        max_tokens: int = 512,
        hook_name: str | None = None,
    ) -> Shown:
        """The tokens of a text, each with the latents that fire most on it: a table, or colours in a notebook.

        Nothing need be known of the dictionary but its hook; with a feature table latents have labels, and with feature
        pages beside it links.

        Args:
            text: a text; chat messages, `[{"role": …, "content": …}, …]`, which go through the tokenizer's template; or
                token ids. A BOS token is put in front of a text if the dictionary says that it was trained so.
            tokenizer: of `transformers`; by default `model.tokenizer`.
            n: latents a token.
            labelled: only latents with a label.
            max_tokens: read no further; what is left out is counted.
            hook_name: as for `attach`.
        Raises:
            ValueError: there is no token in the text, no tokenizer or chat template, or the model does not fit.
        """
        return show(self, text, model, tokenizer, n=n, labelled=labelled, max_tokens=max_tokens, hook_name=hook_name)

    # ---- folders --------------------------------------------------------------------------------------------------

    @classmethod
    def register_resolver(cls, resolver: Resolver | None) -> None:
        """Set what finds names that are no local folder (a Hub id, a URL); None removes it."""
        cls._resolver = resolver

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        *,
        subfolder: str | None = None,
        revision: str | None = None,
        token: str | None = None,
        hook_name: str | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        verify: bool = False,
    ) -> "Dictionary":
        """The dictionary in a folder, of ours or of another tool (`sae.interop`), which its contents tell.

        Args:
            path: a folder, a file of a format that is a single file, or a name that the registered resolver knows; with
                `pipelines.hub` imported: a Hugging Face repository ("org/name", "org/name/sub/folder"), the URL of an
                object store, or SAELens's "release/sae_id".
            subfolder: the dictionary's folder inside `path`.
            revision, token: for the resolver.
            hook_name: in place of what the folder records, which need not be how the model at hand names it.
            dtype: of the weights; thresholds stay in float32.
            verify: compare the weights with the hash in dictionary.json. cfg.json is always compared.
        Raises:
            FileNotFoundError: if there is no such dictionary, or a needed file of it does not exist.
            ValueError: if it is damaged, of several formats, or not one that can be computed here, naming the file and
                the key or tensor.
        """
        place = cls._place(path, subfolder, revision, token)
        contents = folders.read(place, verify=verify)
        hooks = (hook_name, *contents.hook_names[1:]) if hook_name else contents.hook_names
        sae = contents.sae.requires_grad_(False)
        if dtype != torch.float32 or torch.device(device).type != "cpu":
            sae.to(device=device, dtype=dtype)
        return cls(
            sae,
            hook_names=hooks,
            metadata=contents.metadata,
            provenance=contents.provenance,
            metrics=contents.metrics,
            path=place if place.is_dir() else None,
        )

    @classmethod
    def list(
        cls, path: str | os.PathLike[str], *, revision: str | None = None, token: str | None = None
    ) -> builtins.list[str]:
        """The dictionaries at and below a folder, or in a repository, as values of `subfolder`; "." is that place.

        Raises: FileNotFoundError if there is no such place.
        """
        place = Path(path)
        if place.is_dir():
            return folders.list_dictionaries(place)
        if cls._resolver is None:
            raise FileNotFoundError(
                f"{path} is not a folder. Check the path, or import `pipelines.hub` for repositories."
            )
        return cls._resolver.list(str(path), revision=revision, token=token)

    def save(
        self,
        path: str | os.PathLike[str],
        *,
        provenance: Mapping[str, Any] | None = None,
        metrics: Mapping[str, Any] | None = None,
        sparsity: Float[Tensor, " d_sae"] | None = None,
        features: Any = None,
        overwrite: bool = False,
    ) -> Path:
        """Write the folder (`sae.folder`); it appears whole or not at all.

        Args:
            provenance, metrics: JSON values; by default those that this dictionary already has.
            sparsity: share of tokens on which each latent fires.
            features: a pyarrow Table with one row per latent.
            overwrite: replace an existing folder with everything in it.
        Raises:
            FileExistsError: if the folder exists and `overwrite` is off.
        """
        target = Path(path)
        folders.write(
            target,
            self.sae,
            hook_names=self.hook_names,
            output_hooks=self.output_hooks,
            metadata=self.metadata,
            provenance=self.provenance if provenance is None else provenance,
            metrics=self.metrics if metrics is None else metrics,
            sparsity=sparsity,
            features=features,
            overwrite=overwrite,
        )
        return target

    @classmethod
    def _place(
        cls, path: str | os.PathLike[str], subfolder: str | None, revision: str | None, token: str | None
    ) -> Path:
        place = Path(path)
        if subfolder is not None and (Path(subfolder).is_absolute() or ".." in Path(subfolder).parts):
            raise ValueError(
                f"`subfolder` must lie inside {path}, got {subfolder!r}. Pass the path of the folder itself."
            )
        if not place.exists() and cls._resolver is not None:
            return cls._resolver.fetch(str(path), subfolder=subfolder, revision=revision, token=token)
        place = place if subfolder is None else place / subfolder
        if not place.is_dir() and not place.is_file():
            raise FileNotFoundError(f"A dictionary is a folder, but {place} is not one. Check the path.")
        return place
