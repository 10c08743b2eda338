"""What every figure is: title, unit, direction, what its interval is over, and its definition with its source.

Written beside the figures, so that a reader of the JSON need not guess whether higher is better.
"""

from dataclasses import asdict, dataclass
from typing import Any, Literal

SCHEMA_VERSION = 1

Direction = Literal["higher", "lower", "none"]
KS = (1, 2, 5, 16)
"""Latents of the sparse probes."""


@dataclass(frozen=True)
class Metric:
    """What one figure is."""

    title: str
    unit: str
    better: Direction
    """`none`: a description, not a merit."""
    counted: str
    """What `n` of the figure counts."""
    interval_over: str
    """What is drawn with replacement for the interval; empty: the figure has none."""
    definition: str


def _splice(suffix: str, where: str) -> dict[str, Metric]:
    """Figures of the spliced forward passes, without and with sinks."""

    def metric(title: str, unit: str, better: Direction, definition: str) -> Metric:
        return Metric(title + where, unit, better, "predictions", "documents", definition)

    return {
        f"ce_clean{suffix}": metric("CE of the model", "nats per prediction", "none", "cross-entropy, nothing spliced"),
        f"ce_spliced{suffix}": metric(
            "CE, spliced", "nats per prediction", "lower", "with the reconstruction in place"
        ),
        f"ce_increase{suffix}": metric("CE increase", "nats per prediction", "lower", "CE_spliced - CE_clean"),
        f"ce_zero{suffix}": metric("CE, zero ablation", "nats per prediction", "none", "with zeros in place"),
        f"ce_loss_score{suffix}": metric(
            "CE score",
            "share of the loss recovered",
            "higher",
            "(CE_zero - CE_spliced) / (CE_zero - CE_clean); SAEBench, arXiv:2503.09532",
        ),
        f"kl_spliced{suffix}": metric("KL, spliced", "nats per prediction", "lower", "KL(clean ‖ spliced)"),
        f"kl_zero{suffix}": metric("KL, zero ablation", "nats per prediction", "none", "KL(clean ‖ zero)"),
        f"kl_div_score{suffix}": metric(
            "KL score", "share recovered", "higher", "1 - KL(clean ‖ spliced) / KL(clean ‖ zero); log-softmax in fp32"
        ),
    }


def _mean_ablation() -> dict[str, Metric]:
    floor = "the store's mean activation in place: a stricter floor than zeros"
    over = ("predictions", "documents")
    return {
        "ce_mean": Metric("CE, mean ablation", "nats per prediction", "none", *over, floor),
        "kl_mean": Metric("KL, mean ablation", "nats per prediction", "none", *over, "KL(clean ‖ mean)"),
        "ce_loss_score_mean": Metric(
            "CE score against the mean", "share of the loss recovered", "higher", *over, f"as ce_loss_score, {floor}"
        ),
        "kl_div_score_mean": Metric(
            "KL score against the mean", "share recovered", "higher", *over, f"as kl_div_score, {floor}"
        ),
    }


def _probing() -> dict[str, Metric]:
    over = ("test documents", "documents")
    how = (
        "logistic regression on means over a document's tokens; columns ranked by |mean of positives - mean of the "
        "others| / sd, penalty by cross-validation, both on training documents alone; macro average over topics; "
        "the interval is over test documents, with the probes as they are"
    )
    compared = {
        "neurons": ("neurons", "coordinates of the activations instead of latents"),
        "pca": ("principal components", "of the training documents, instead of latents"),
        "random": ("random latents", "of random directions, as many and as many active, instead of the dictionary's"),
        "shuffled": ("latents, topics shuffled", "topics shuffled over training documents"),
    }
    metrics = {
        f"probe_latents_auroc_k{k}": Metric(
            f"Probe on {k} latents", "AUROC", "higher", *over, f"of the dictionary; {how}"
        )
        for k in KS
    }
    metrics["probe_dense_auroc"] = Metric(
        "Dense probe", "AUROC", "none", *over, f"all coordinates of the activations: a ceiling; {how}"
    )
    metrics |= {
        f"probe_{name}_auroc_k{k}": Metric(f"Probe on {k} {title}", "AUROC", "none", *over, f"{what}; {how}")
        for name, (title, what) in compared.items()
        for k in KS
    }
    for k in KS:
        metrics[f"probe_latents_accuracy_k{k}"] = Metric(
            f"Balanced accuracy, {k} latents",
            "mean of sensitivity and specificity",
            "higher",
            "test documents",
            "documents",
            "the same probe, threshold fitted on training documents with classes weighted equally",
        )
        metrics[f"probe_latents_f1_k{k}"] = Metric(
            f"F1, {k} latents", "F1", "higher", "test documents", "documents", "the same probe and threshold"
        )
    return metrics


def _geometry() -> dict[str, Metric]:
    over = ("latents", "latents")
    return {
        "max_decoder_cosine": Metric(
            "Largest decoder cosine", "cosine", "lower", *over, "mean over latents of the largest cosine with another"
        ),
        "duplicate_share": Metric(
            "Near duplicates", "share of latents", "lower", *over, "decoder cosine above 0.9 with another latent"
        ),
        "encoder_decoder_cosine": Metric(
            "Encoder–decoder cosine", "cosine", "none", *over, "mean cosine of what a latent reads and what it writes"
        ),
        "decoder_norm": Metric("Decoder norm", "norm", "none", *over, "mean norm of the decoder rows"),
    }


def _roles() -> dict[str, Metric]:
    source = "Arad, Mueller, Belinkov 2025, arXiv:2505.20063"
    over = ("latents", "latents")
    return {
        "input_score": Metric(
            "Input score",
            "share of windows",
            "none",
            *over,
            "share of a latent's 100 strongest windows whose peak token is among the 20 tokens that it promotes most; "
            f"mean over sampled latents; {source}",
        ),
        "output_score": Metric(
            "Output score",
            "probability times rank",
            "higher",
            *over,
            "(1 - best rank / vocabulary) * largest probability of those 20 tokens after ten times the prompt's "
            f"strongest activation is added to the latent; mean over sampled latents; {source}",
        ),
    }


def _absorption(prefix: str, what: str) -> dict[str, Metric]:
    over = ("test documents", "documents")
    how = "thresholds of SAEBench 0.6, generic form: texts and mean activations in place of spelled words"
    return {
        f"{prefix}absorption_full": Metric(
            f"Absorption{what}, full",
            "share of documents",
            "lower",
            *over,
            "texts of the concept that the dense probe finds, whose main latents are silent while another latent "
            f"carries the probe's direction; mean over concepts; {how}",
        ),
        f"{prefix}absorption_fraction": Metric(
            f"Absorption{what}, fraction",
            "share of the projection",
            "lower",
            *over,
            f"how much of the probe's projection other latents carry for the main ones; mean over concepts; {how}",
        ),
    }


_TOKENS = ("tokens", "documents")
METRICS: dict[str, Metric] = {
    "l0": Metric("L0", "active latents per token", "none", *_TOKENS, "mean number of nonzero latents"),
    "l0_all": Metric("L0, all tokens", "active latents per token", "none", *_TOKENS, "attention sinks included"),
    "fvu": Metric(
        "FVU", "share of variance", "lower", *_TOKENS, "Σ‖x - x_hat‖² / Σ‖x - mean‖² over the whole held-out split"
    ),
    "fvu_all": Metric("FVU, all tokens", "share of variance", "lower", *_TOKENS, "attention sinks included"),
    "mse": Metric("MSE", "squared activation units per token", "lower", *_TOKENS, "mean of ‖x - x_hat‖²"),
    "cosine": Metric("Cosine", "cosine", "higher", *_TOKENS, "mean of cos(x, x_hat)"),
    "norm_ratio": Metric("Norm ratio", "ratio", "none", *_TOKENS, "mean of ‖x_hat‖ / ‖x‖; 1 is right"),
    "relative_bias": Metric(
        "Relative reconstruction bias",
        "ratio",
        "none",
        *_TOKENS,
        "E‖x_hat‖² / E⟨x, x_hat⟩; 1 is right, below it is shrinkage; arXiv:2404.16014, eq. 10",
    ),
    "dead_share": Metric(
        "Silent latents",
        "share of latents",
        "lower",
        "tokens",
        "documents (delete-one jackknife)",
        "latents that fire on none of the n held-out tokens; falls with n, so compare at one n",
    ),
    "dense_share": Metric(
        "Dense latents",
        "share of latents",
        "lower",
        "tokens",
        "latents",
        "latents that fire on more than 10 % of tokens",
    ),
    "density": Metric("Density", "share of latents", "none", *_TOKENS, "L0 / number of latents"),
    **_splice("", ""),
    **_mean_ablation(),
    **_splice("_all", ", all tokens"),
    **_geometry(),
    **_roles(),
    **_probing(),
    **_absorption("", " of the topics"),
    **_absorption("concept_", " of your concepts"),
}
"""Every figure that has a direction or an interval, by its flat name."""


def as_json() -> dict[str, Any]:
    """The schema as it is written beside the figures."""
    return {name: asdict(metric) for name, metric in METRICS.items()}
