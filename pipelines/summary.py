"""The table at the end of a run: what a person wants to know, and where to look next."""

import math
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from pipelines.run import Run
from pipelines.rundir import PAGES, read_json


def summary(run: Run) -> dict[str, Any]:
    """The run's headline figures, by SAE, and the audits' verdicts."""
    metrics = run.dir.metrics()
    saes = {}
    for name in run.config.saes:
        prefix = f"{name}."
        record = run.dir.trained(name) / "dictionary.json"
        saes[name] = {
            "config": read_json(record)["config"] if record.exists() else {},
            **{key.removeprefix(prefix): value for key, value in metrics.items() if key.startswith(prefix)},
        }
    audits = {}
    for report in run.dir.stage_results("audit"):
        verdict = read_json(report.with_name("audit.json"))["verdict"]
        audits[report.parent.name] = {
            **{key: verdict[key] for key in ("level", "latent", "auroc", "low", "high", "sentence")},
            "report": str(report),
        }
    return {"run": str(run.dir.path), "n_tokens": metrics.get("collect.n_tokens"), "saes": saes, "audits": audits}


def print_summary(run: Run, console: Console) -> None:
    """Print the table."""
    figures = summary(run)
    for name, m in figures["saes"].items():
        trained = m["config"]  # of the dictionary itself, which may be one that the run did not train
        table = Table(
            title=f"{run.config.name} / {name}: {trained.get('architecture', 'SAE')} on {run.config.hook_of(name)}",
            show_header=False,
            title_justify="left",
        )
        table.add_column(style="bold")
        table.add_column(justify="right")
        table.add_column(style="dim")
        table.add_row(
            "tokens",
            f"{figures['n_tokens'] or 0:,}",
            f"{m.get('n_heldout_tokens', 0):,} of them held out and not sinks",
        )
        if "l0" in m:
            table.add_row(
                "L0", f"{m['l0']:.1f}", "active latents a token" + (f" (k = {trained['k']})" if "k" in trained else "")
            )
            table.add_row(
                "FVU", f"{m['fvu']:.3f}", f"unexplained variance, lower is better; with sinks {m['fvu_all']:.3f}"
            )
            if "ce_loss_score" in m:
                table.add_row(
                    "loss recovered",
                    _score(m["ce_loss_score"]),
                    f"CE score, 1 is perfect; KL score {_score(m['kl_div_score'])}; all tokens spliced "
                    f"{_score(m['ce_loss_score_all'])}",
                )
            table.add_row(
                "dead latents", f"{m['dead_share']:.1%}", f"of {m['n_latents']:,}, silent on the held-out tokens"
            )
        share = m.get("label_share_labelled")
        if share is not None and not math.isnan(share):
            table.add_row(
                "labelled",
                f"{share:.1%}",
                f"of live latents passed the held-out test; rules dealt at random {m['label_null_share']:.1%}",
            )
        surviving = m.get("label_share_surviving")
        if surviving is not None:
            table.add_row(
                "surviving",
                f"{surviving:.1%}",
                "of live latents: the label also holds against the same tokens elsewhere and the same documents",
            )
        console.print(table)
    if figures["audits"]:
        table = Table(title="audit: the best confirmed latent of each concept", title_justify="left")
        table.add_column("concept", style="bold")
        table.add_column("verdict")
        table.add_column("AUROC (95 %)", no_wrap=True)
        table.add_column()
        for name, audit in figures["audits"].items():
            interval = f"{audit['auroc']:.2f} ({audit['low']:.2f}–{audit['high']:.2f})" if audit["auroc"] else "–"
            table.add_row(escape(name), audit["level"].replace("_", " "), interval, escape(audit["sentence"]))
        console.print(table)
    console.print("look next:", style="bold")
    for name in figures["saes"]:
        folder = run.dir.dictionary(name)
        console.print(f"  {folder}  sae.Dictionary.load(...), features.parquet", highlight=False)
        if (folder / PAGES / "index.html").exists():
            console.print(f"  {folder / PAGES / 'index.html'}", highlight=False)
    for audit in figures["audits"].values():
        console.print(f"  {audit['report']}", highlight=False)
    console.print(f"  {run.dir.metrics_path}", highlight=False)


def _score(value: float | None) -> str:
    """A score, or a dash where zero ablation did no harm."""
    return "–" if value is None else f"{value:.3f}"
