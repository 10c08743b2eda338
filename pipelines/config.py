"""The run's configuration: the sections of one YAML file, every key typed. `configio` reads and writes them.

The defaults below are the ones that a run gets; the resolved copy is saved as `config.yaml` in the run directory.
"""

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from pipelines.audit.causal.settings import CausalConfig
from pipelines.labels.in_model_settings import EditsConfig, OutputTestConfig
from pipelines.labels.llm.settings import LLMConfig
from pipelines.section import Section
from pipelines.selection import Selection, selection_of

DOCUMENT_COLUMNS = frozenset({"id", "source", "title", "topic", "split", "n_tokens", "text"})
"""Columns that documents.parquet always has."""


class ModelConfig(Section):
    """The language model."""

    source: str
    """Hugging Face id, folder, `.gguf` file, or `package://PACKAGE/FILE.gguf` for a file inside an installed
    package."""
    revision: str | None = None
    """Branch, tag or commit of a Hugging Face id."""
    sha256: str | None = None
    """Expected digest of a single-file source; a mismatch stops the run."""
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """Precision of the forward pass and of the stored activations."""
    device: str = "auto"
    """`auto` takes a GPU where there is one; else a torch device."""
    trust_remote_code: bool = False
    """Run Python code that a Hugging Face repository ships. Off: such a model is refused."""


class TextSource(Section):
    """One weighted source of documents: plain text, chat messages or token ids."""

    id: str | None = Field(None, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Short name, for `select`; by default the path or data set id."""
    path: str | None = None
    """`.txt`, `.jsonl`, `.json` or `.parquet`, a folder of such files of one kind, or `package://PACKAGE/FILE` for a
    file of an installed package."""
    dataset: str | None = None
    """Hugging Face dataset id, streamed unless `split` is a slice such as `train[:1%]`; needs the extra `hub`."""
    name: str | None = None
    """Configuration of the Hugging Face dataset."""
    split: str = "train"
    """Split of the Hugging Face dataset."""
    revision: str | None = None
    """Revision of the Hugging Face dataset; resolved to a commit, which is recorded."""
    shuffle_buffer: int = Field(10_000, gt=0)
    """Documents among which a streamed dataset is shuffled; other sources are shuffled as a whole."""
    sha256: str | None = None
    """Expected digest of the file."""
    document: Literal["line", "file"] | None = None
    """What a document of a `.txt` is; by default a line of a single file, and the whole of each file of a folder."""
    text_field: str | None = None
    """Field or column that holds the text; by default `text`."""
    messages_field: str | None = None
    """Field or column that holds a chat, a list of {role, content}; it goes through the tokenizer's chat template."""
    tokens_field: str | None = None
    """Field or column that holds token ids of the model's tokenizer."""
    tokenizer_sha256: str | None = None
    """Expected digest of the tokenizer.json that made `tokens_field`."""
    title_field: str | None = None
    """Field or column that holds a title; it is not given to the model."""
    topic_field: str | None = None
    """Field or column that holds a topic."""
    columns: tuple[str, ...] = ()
    """Further fields to keep in documents.parquet, such as url or licence."""
    topics_path: str | None = None
    """JSON object from document id to topic, where the topic is not in the file itself."""
    topics_sha256: str | None = None
    """Expected digest of `topics_path`."""
    weight: float = Field(1.0, gt=0)
    """Share of the tokens, relative to the other sources."""

    @property
    def kind(self) -> Literal["text", "chat", "tokens"]:
        """What a document's field holds."""
        return "chat" if self.messages_field else "tokens" if self.tokens_field else "text"

    @property
    def field(self) -> str:
        """The field that holds a document's content."""
        return self.messages_field or self.tokens_field or self.text_field or "text"

    @property
    def origin(self) -> str:
        """Where the documents come from, as the config gives it."""
        return self.path or f"hub:{self.dataset}"

    @model_validator(mode="after")
    def _one_origin(self) -> "TextSource":
        if (self.path is None) == (self.dataset is None):
            raise ValueError("a text source needs exactly one of `path` and `dataset`")
        fields = [name for name in ("text_field", "messages_field", "tokens_field") if getattr(self, name) is not None]
        if len(fields) > 1:
            raise ValueError(f"a text source holds one kind of document: give one of {', '.join(fields)}")
        if self.tokenizer_sha256 is not None and self.tokens_field is None:
            raise ValueError("tokenizer_sha256 belongs to `tokens_field`: drop it, or give that")
        if self.document is not None and self.path is None:
            raise ValueError("`document` is for `.txt` files: drop it, or give `path`")
        taken = sorted(set(self.columns) & DOCUMENT_COLUMNS)
        if taken:
            raise ValueError(
                f"`columns` lists {taken}, which documents.parquet has anyway; rename the field, or use title_field or "
                "topic_field"
            )
        if len(set(self.columns)) != len(self.columns):
            raise ValueError(f"`columns` lists a field twice: {list(self.columns)}")
        return self


class CollectConfig(Section):
    """Text to stored activations."""

    n_tokens: int = Field(gt=0)
    """Tokens to store over all sources and both splits."""
    context_length: int = Field(256, ge=8)
    """Tokens a context; documents are packed into contexts without padding."""
    heldout_fraction: float = Field(0.1, gt=0, lt=1)
    """Share of the documents that training never sees."""
    isolate_documents: bool = True
    """Attention and positions restart at each document."""
    prepend_bos: bool = False
    """Put the tokenizer's BOS in front of every document."""
    contexts_per_shard: int = Field(64, gt=0)
    """Contexts a shard: the unit that is written, committed and, after a crash, redone."""
    batch_contexts: int = Field(8, gt=0)
    """Contexts a forward pass; batches never cross a shard."""
    n_workers: int = Field(2, gt=0)
    """Ray actors that run the model."""
    cpus_per_worker: float = Field(1, gt=0)
    """CPUs an actor, also its number of torch threads."""
    gpus_per_worker: float = Field(0, ge=0)
    """GPUs an actor."""
    stored_dtype: Literal["auto", "bfloat16", "float16", "float32", "int8"] = "auto"
    """`auto` stores what the model gives; `int8` takes half of bfloat16, `sae info` shows the error that it makes."""
    compression: Literal["none", "blosc"] = "none"
    """`blosc` makes files smaller (`sae info` shows the ratio) and reading slower: no memory map."""
    chat_template_path: str | None = None
    """Jinja file used for chats in place of the tokenizer's own template."""
    text_workers: int | None = Field(None, gt=0)
    """Processes that tokenise; by default one a core, and none where the text is short."""
    store: str | None = None
    """A shared store outside the run: a folder, or a URL such as s3://bucket/prefix (credentials come from the
    environment); by default `activations/` in the run directory."""
    mode: Literal["store", "stream"] = "store"
    """`stream` trains while it collects, in one pass, and keeps all held-out and a tenth of the training contexts."""
    capacity_shards: int = Field(64, gt=0)
    """Shards that `stream` has on disk at once, besides those that it keeps."""

    @field_validator("store")
    @classmethod
    def _plain_url(cls, store: str | None) -> str | None:
        if store is not None and "://" in store:
            from storage.backends import check_url

            check_url(store)
        return store


class SAESpec(Section):
    """One sparse autoencoder under `saes:`."""

    architecture: Literal[
        "standard", "gated", "topk", "batchtopk", "jumprelu", "matryoshka_batchtopk", "transcoder", "crosscoder"
    ] = "batchtopk"
    """Which architecture to train."""
    hook: str | None = None
    """Which of `hooks` it reads; by default the first."""
    target_hook: str | None = None
    """transcoder: which of `hooks` it predicts."""
    hooks: tuple[str, ...] | None = None
    """crosscoder: which of `hooks` it reads together; by default all. Sinks are those of the first."""
    d_sae: int | None = Field(None, gt=0)
    """Number of latents; or give `expansion_factor`."""
    expansion_factor: float = Field(8.0, gt=0)
    """d_sae / d_in, used when `d_sae` is not given."""
    k: int | None = Field(None, gt=0)
    """Active latents a token (on average, for selections over a batch); 32 for the architectures that have a k."""
    activation: Literal["topk", "batchtopk"] | None = None
    """transcoder: how the k latents are chosen; batchtopk by default."""
    skip: bool | None = None
    """transcoder: add an affine map of the input to the output."""
    sparsity: Literal["l1", "batchtopk"] | None = None
    """crosscoder: what keeps it sparse; batchtopk by default."""
    prefix_sizes: tuple[int, ...] | None = None
    """matryoshka_batchtopk: latents of each nested dictionary, rising to d_sae."""
    n_sampled_prefixes: int | None = Field(None, ge=0)
    """matryoshka_batchtopk: draw this many prefix sizes in each step."""
    l1_coefficient: float | None = Field(None, ge=0)
    """standard, gated, crosscoder with l1: weight of the penalty."""
    penalty: Literal["l0", "tanh"] | None = None
    """jumprelu: what the penalty counts; l0 by default."""
    sparsity_coefficient: float | None = Field(None, ge=0)
    """jumprelu: weight of the penalty."""
    seed: int | None = Field(None, ge=0)
    """Seed of the initial weights; by default the run's, which also orders the data."""

    @model_validator(mode="before")
    @classmethod
    def _default_k(cls, values: Any) -> Any:
        if not isinstance(values, dict) or values.get("k") is not None:
            return values
        has_k = "k" in _SETTINGS.get(str(values.get("architecture", "batchtopk")), ())
        return values | {"k": 32} if has_k else values

    @model_validator(mode="after")
    def _settings_of_this_architecture(self) -> "SAESpec":
        known = _SETTINGS[self.architecture]
        foreign = [name for name in sorted(set().union(*_SETTINGS.values()) - known) if getattr(self, name) is not None]
        if foreign:
            raise ValueError(
                f"{', '.join(foreign)} cannot be set for {self.architecture}, which has {', '.join(sorted(known))}"
            )
        if self.architecture == "transcoder" and self.target_hook is None:
            raise ValueError("a transcoder needs `target_hook`, the hook that it predicts")
        if self.architecture == "crosscoder" and self.hook is not None:
            raise ValueError("a crosscoder reads `hooks`, not one `hook`")
        return self

    def settings(self) -> dict[str, Any]:
        """What goes to the architecture's own configuration: the settings that were given, but for hooks and widths."""
        names = _SETTINGS[self.architecture] - {"target_hook", "hooks"}
        return {name: value for name in sorted(names) if (value := getattr(self, name)) is not None}


_SETTINGS: dict[str, frozenset[str]] = {
    "standard": frozenset({"l1_coefficient"}),
    "gated": frozenset({"l1_coefficient"}),
    "topk": frozenset({"k"}),
    "batchtopk": frozenset({"k"}),
    "jumprelu": frozenset({"penalty", "sparsity_coefficient"}),
    "matryoshka_batchtopk": frozenset({"k", "prefix_sizes", "n_sampled_prefixes"}),
    "transcoder": frozenset({"k", "activation", "skip", "target_hook"}),
    "crosscoder": frozenset({"k", "sparsity", "l1_coefficient", "hooks"}),
}
"""Settings of `SAESpec` that only some architectures have."""


class SelectConfig(Section):
    """Which tokens a stage works on: those that fit every line that is given."""

    source: tuple[str | int, ...] | None = None
    """Text sources, by id, path, data set or position in `text`."""
    role: tuple[str, ...] | None = None
    """text (of plain texts), system, user, assistant, tool, template (what the chat template adds)."""
    turn: tuple[int, ...] | None = None
    """Positions of messages in their chats, from 0."""

    @field_validator("source", "role", "turn", mode="before")
    @classmethod
    def _one_is_a_list(cls, value: Any) -> Any:
        return [value] if isinstance(value, str | int) else value


class TrainConfig(Section):
    """Optimisation; one set for all SAEs of the run, which are trained together on the same batches."""

    n_tokens: int = Field(gt=0)
    """Tokens that each SAE sees; more than the store holds means several epochs."""
    batch_size: int = Field(4096, gt=0)
    """Tokens a step, over all workers."""
    lr: float | None = Field(None, gt=0)
    """Peak learning rate of Adam; by default the architecture's."""
    warmup_fraction: float = Field(0.05, ge=0, lt=1)
    """Share of the steps with a linear warm-up."""
    decay_fraction: float = Field(0.3, ge=0, le=1)
    """Share of the steps, at the end, with a linear decay to zero."""
    auxk_alpha: float = Field(1 / 32, ge=0)
    """Weight of the auxiliary loss that revives dead latents (Gao et al. 2024, section 2.4)."""
    normalize: Literal["none", "scale", "centre", "centre_scale"] = "scale"
    """`scale` multiplies inputs so that their mean squared distance from the mean is d_in, `centre` takes each
    dimension's mean away; folded into the weights at the end."""
    num_workers: int = Field(1, gt=0)
    """Ray Train workers."""
    layout: Literal["data", "features", "saes"] = "data"
    """What each of several workers has: a share of the rows of every batch and all latents; or a share of the latents
    and all rows, which takes less memory, and sends less where a batch has fewer tokens than the SAE twice the latents;
    or some of the run's SAEs, which then need nothing from each other.
    """
    cpus_per_worker: float | None = Field(None, gt=0)
    """CPUs a worker; by default the machine's, shared evenly."""
    use_gpu: bool = False
    """Give each worker a GPU."""
    checkpoint_every: int = Field(50, gt=0)
    """Steps between checkpoints."""
    checkpoints_kept: int = Field(2, ge=2)
    """Newest checkpoints that are kept of each SAE; `sae export --checkpoint` makes a dictionary of any."""
    shuffle_contexts: int = Field(1024, gt=0)
    """Most contexts that are shuffled together; twice as many are in memory, spread over the workers ("data") or in
    each of them."""
    streams: int = Field(16, gt=0)
    """Streams that each batch takes equally many rows of: `batch_size` is a multiple of it, and it, under
    "data", of `num_workers`."""
    max_same_context: float = Field(8.0, gt=0)
    """Most other tokens of its own context that a token may meet in a batch, on average; more is refused."""
    select: SelectConfig | None = None
    """Train on these tokens only."""
    init_from: str | dict[str, str] | None = None
    """Dictionary folder to start from, of the same architecture and shape; or one for each SAE, by name."""
    evaluate_every: int | None = Field(None, ge=0)
    """Steps between held-out figures in metrics.jsonl, 0 for none. By default 100; none with `collect.mode: stream`,
    which writes held-out contexts last."""
    evaluate_ce_tokens: int = Field(0, ge=0)
    """Held-out tokens for CE and KL scores beside them: above 0, the first worker loads the language model."""
    trackers: tuple[Literal["tensorboard", "wandb", "mlflow"], ...] = ()
    """Where the figures of metrics.jsonl go as well; needs the extra `trackers`. Offline mode and addresses are the
    libraries' own environment variables (WANDB_MODE, MLFLOW_TRACKING_URI)."""


class SinkConfig(Section):
    """Attention sinks: the first position of every document, and tokens of very large norm."""

    multiple: float = Field(3.0, gt=1)
    """A token is a sink when its norm exceeds this many medians of the store."""
    train_on_them: bool = False
    """Train on sinks too. Headline figures, labels and audits leave them out either way."""


class DictionarySource(Section):
    """An existing dictionary to start from, in place of `train:`."""

    path: str
    """Folder of a dictionary, ours or another tool's; a Hugging Face repository, an object store's URL, or SAELens's
    release/sae_id."""
    subfolder: str | None = None
    """Folder inside `path`."""
    revision: str | None = None
    """Branch, tag or commit of a Hugging Face repository."""


class EvaluateConfig(Section):
    """Held-out evaluation."""

    n_ce_tokens: int = Field(8192, gt=0)
    """Held-out tokens for the spliced forward passes (CE and KL scores); FVU, L0 and dead latents use all held-out
    tokens."""
    batch_contexts: int = Field(4, gt=0)
    """Contexts a forward pass."""
    select: SelectConfig | None = None
    """Figures are over these tokens only, and over predictions made at them."""
    n_resamples: int = Field(1000, ge=100)
    """Bootstrap resamples of the documents behind every interval."""
    probe_documents: int = Field(400, ge=0)
    """Training documents that k-sparse probes are fitted to, and at most as many held-out ones that test them; 0 for
    no probes. They need documents with a topic."""
    probe_column: str = "topic"
    """What the probes predict: a column of documents.parquet with a few different values."""
    probe_exclude: tuple[str, ...] = ("Uncategorized",)
    """Values of that column that say nothing: such documents are left out."""
    concepts: tuple[str, ...] = ()
    """Concepts whose absorption is measured besides that of the probes' topics: names or paths, as for audits."""
    score_latents: int = Field(256, ge=0)
    """Latents, drawn at random, whose input and output scores are computed; 0 for none."""


class LabelConfig(Section):
    """Labels and their tests."""

    enabled: bool = True
    """Off leaves the dictionary without labels."""
    min_detection: float = Field(0.6, ge=0.5, lt=1)
    """A label counts when its held-out balanced accuracy has a 95 % lower bound above this; 0.5 is chance."""
    select: SelectConfig | None = None
    """Rules are fitted to and tested on these tokens only."""
    edits: EditsConfig = EditsConfig()
    """Contexts are edited and run again; off by default."""
    output_test: OutputTestConfig = OutputTestConfig()
    """Latents are amplified, and their promised tokens have to rise; off by default."""
    prefer: tuple[str, ...] = Field(("predicate",), min_length=1)
    """Whose label features.parquet shows, the first of these that passed its test: predicate, llm, human, human:NAME …;
    labels.parquet has them all."""
    llm: LLMConfig | None = None
    """Labels by a language model behind an OpenAI-compatible endpoint, in addition; off by default."""


class AuditConfig(Section):
    """Which concepts are audited, and how."""

    concepts: tuple[str, ...] = ()
    """Names of shipped concepts, or paths of concept files."""
    n_permutations: int = Field(1000, ge=100)
    """Shuffles of the labels behind the null."""
    alpha: float = Field(0.05, gt=0, lt=0.5)
    """Family-wise error rate of confirming one concept's candidates; discovery takes the largest z, whatever its p."""
    max_candidates: int = Field(10, gt=0)
    """Latents that go on from discovery to confirmation."""
    max_tokens: int = Field(256, gt=0)
    """Longest example, in tokens; longer ones are cut and counted."""
    corpus_negatives: int = Field(80, ge=0)
    """Beginnings of held-out documents that are added to the examples of concept files, as easy negatives."""
    select: SelectConfig | None = None
    """Documents of the corpus count with these tokens only; the texts of concept files are plain."""
    causal: CausalConfig = CausalConfig()


class RayConfig(Section):
    """Where Ray runs. Without an address it is started on this machine, for this run only."""

    address: str | None = None
    """Address of a running cluster."""
    num_cpus: int | None = Field(None, gt=0)
    """CPUs given to a local Ray; by default all."""
    num_gpus: int | None = Field(None, ge=0)
    """GPUs given to a local Ray; by default all that torch sees."""
    object_store_memory_mb: int = Field(160, ge=80)
    """Object store of a local Ray; activations never pass through it."""


class RunConfig(Section):
    """The whole run."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Name of the run; its directory is `runs/NAME` unless `--out` says otherwise."""
    seed: int = Field(0, ge=0)
    """Seed of everything random in the run."""
    model: ModelConfig
    text: tuple[TextSource, ...] = Field(min_length=1)
    hooks: tuple[str, ...] = Field(min_length=1)
    """Module paths, with `:output` (default) or `:input`."""
    collect: CollectConfig
    saes: dict[str, SAESpec] = Field(min_length=1)
    sinks: SinkConfig = SinkConfig()
    train: TrainConfig | None = None
    dictionary: DictionarySource | None = None
    evaluate: EvaluateConfig = EvaluateConfig()
    label: LabelConfig = LabelConfig()
    audit: AuditConfig = AuditConfig()
    ray: RayConfig = RayConfig()

    @field_validator("saes")
    @classmethod
    def _sae_names(cls, saes: dict[str, SAESpec]) -> dict[str, SAESpec]:
        for name in saes:
            if not name.replace("-", "").replace("_", "").isalnum():
                raise ValueError(f"the SAE name {name!r} becomes a folder: use letters, digits, '-' and '_' only")
            if name == "collect":
                raise ValueError("an SAE cannot be named 'collect': metrics.json uses that prefix; choose another name")
        return saes

    @model_validator(mode="after")
    def _consistent(self) -> "RunConfig":
        if (self.train is None) == (self.dictionary is None):
            raise ValueError("give exactly one of `train:` and `dictionary:`")
        if self.dictionary is not None and len(self.saes) != 1:
            raise ValueError("a run that starts from a dictionary has exactly one entry under `saes:`")
        for hook in self.hooks:
            if hook.partition(":")[2] not in ("", "input", "output"):
                raise ValueError(f"the hook {hook!r} must end in `:output` (the default) or `:input`")
        if len({hook.removesuffix(":output") for hook in self.hooks}) != len(self.hooks):
            raise ValueError(f"`hooks` lists a hook twice: {list(self.hooks)}")
        for name, sae in self.saes.items():
            if sae.hook is not None and sae.hook not in self.hooks:
                raise ValueError(f"saes.{name}.hook is {sae.hook!r}, which is not in `hooks`: {list(self.hooks)}")
            for hook in self.hooks_of(name):
                if hook not in self.hooks:
                    raise ValueError(f"saes.{name} names {hook!r}, which is not in `hooks`: {list(self.hooks)}")
            if sae.architecture == "crosscoder" and len(set(self.hooks_of(name))) < 2:
                raise ValueError(f"saes.{name} is a crosscoder, which needs at least two different hooks")
        for stage in ("train", "evaluate", "label", "audit"):
            try:
                self.selection(stage)
            except ValueError as error:
                raise ValueError(f"{stage}.select: {error}") from error
        return self

    def selection(self, stage: str) -> Selection:
        """Codes of the tokens that the stage `train`, `evaluate`, `label` or `audit` works on."""
        return selection_of(getattr(getattr(self, stage), "select", None), self.text)

    def hook_of(self, sae: str) -> str:
        """The hook that the SAE `sae` reads; of a crosscoder the first. Its norms say which tokens are sinks."""
        return self.hooks_of(sae)[0]

    def hooks_of(self, sae: str) -> tuple[str, ...]:
        """The hooks whose activations make a training batch of the SAE `sae`: input, then a transcoder's target."""
        spec = self.saes[sae]
        if spec.architecture == "crosscoder":
            return spec.hooks or self.hooks
        target = () if spec.target_hook is None else (spec.target_hook,)
        return (spec.hook or self.hooks[0], *target)
