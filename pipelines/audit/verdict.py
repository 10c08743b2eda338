"""From numbers to claims: what each latent is credited with, the verdict in a sentence, and what must not be concluded.

The ladder, lowest first; part of a verdict only if everything below it holds as well:

    not_confirmed   no evidence on the confirm half
    associated      Holm-adjusted permutation p on the confirm half at or below alpha
    detects         the lower bound that holds for all candidates at once (`Candidate.low_familywise`) is above
                    `detects_above`, the AUROC above what the same search reaches on shuffled labels, and words alone
                    do not explain it

Both rungs are controlled over the candidates of one concept: the chance that any of them wrongly reaches one is at most
about alpha (Holm for the first, Bonferroni for the second).
"""

from collections.abc import Sequence

from pipelines.audit.concepts import Concept
from pipelines.audit.result import Baseline, Candidate, Claim, Level, Verdict

RANK: dict[Claim, int] = {"not_confirmed": 0, "associated": 1, "detects": 2}


def claim_of(
    candidate: Candidate, *, null_upper: float, confounded: bool, reused: int, alpha: float, detects_above: float
) -> Claim:
    """The highest rung that a candidate reaches; on confirm texts that were opened before, not above 'associated'."""
    if candidate.p_holm > alpha:
        return "not_confirmed"
    strong = candidate.low_familywise > detects_above and candidate.auroc > null_upper
    return "detects" if strong and not confounded and not reused else "associated"


def headline(candidates: Sequence[Candidate]) -> Candidate | None:
    """The latent that the verdict names: of those on the highest rung, the one with the largest z on the discover half.

    Never the one with the largest confirm AUROC: the maximum of several estimates overstates the truth.
    """
    reached = max((RANK[c.claim] for c in candidates), default=0)
    top = [c for c in candidates if RANK[c.claim] == reached]
    return max(top, key=lambda c: c.discover_z) if reached else None


def words_explain(
    concept: Concept, baselines: Sequence[Baseline], candidates: Sequence[Candidate], alpha: float
) -> bool:
    """Whether the audit is CONFOUNDED: words alone surely beat chance and come within 0.02 of what the model offers.

    What the model offers is the best of the dense probes and of the latents that Holm confirms. Never for topics, which
    are a matter of vocabulary by nature.
    """
    offered = [b.auroc for b in baselines if b.name.startswith("dense")]
    offered += [c.auroc for c in candidates if c.p_holm <= alpha]
    words = next(b for b in baselines if b.name == "bag_of_words")
    return concept.topic is None and words.low > 0.5 and words.auroc >= max(offered, default=0.0) - 0.02


def verdict_on(
    concept: Concept, candidates: Sequence[Candidate], *, confounded: bool, reused: int, smallest: float
) -> Verdict:
    """The answer for one concept: the latent that `headline` names, or the effect that would have been seen."""
    about = concept.display.lower() if concept.topic is None else concept.display
    best = headline(candidates)
    level: Level = "nothing_found"
    if best is None:
        sentence = (
            f"No latent was confirmed to respond to text about {about}. Ignoring ties, a design of this size finds a "
            f"latent with a true AUROC of about {smallest:.2f} about 80 times of 100."
        )
    elif best.claim == "detects":
        level = "detects"
        sentence = (
            f"Latent {best.latent} detects text about {about}, on texts that had no part in choosing it: "
            f"AUROC {_figure(best)}."
        )
    else:
        level = "associated"
        sentence = (
            f"Latent {best.latent} is associated with text about {about}, on texts that had no part in choosing it: "
            f"AUROC {_figure(best)}; that it detects such text is not shown."
        )
        if confounded:
            sentence += " Words alone separate these texts as well as the model does, so no stronger claim is possible."
        if reused:
            sentence += f" The confirm texts had been opened {reused} time(s) before, so no stronger claim is possible."
    return Verdict(
        level=level,
        confounded=confounded,
        sentence=sentence,
        latent=best.latent if best else None,
        auroc=best.auroc if best else None,
        low=best.low if best else None,
        high=best.high if best else None,
        minimum_detectable_auroc=round(smallest, 6),
    )


def limits_of(
    concept: Concept,
    candidates: Sequence[Candidate],
    baselines: Sequence[Baseline],
    *,
    confounded: bool,
    reused: int,
    unseen: float | None,
    has_corpus: bool,
) -> list[str]:
    """What the reader must not conclude, in plain words, most important first."""
    out = []
    if confounded:
        out.append(
            "CONFOUNDED: a bag of words separates the confirm texts as well as the model does. No latent can be "
            "credited with more than association; harder negatives are needed."
        )
    if reused:
        out.append(
            f"REUSED({reused}): these confirm texts had been opened with this dictionary before. What was seen then "
            "may have shaped this audit, so its error rates do not hold; more than association needs fresh texts."
        )
    if concept.topic is not None:
        out.append(
            "A topic is a matter of vocabulary, so words alone are expected to do well; the comparison is shown, not "
            "judged."
        )
    dense = [b for b in baselines if b.name.startswith("dense")]
    best = headline(candidates)
    if dense and best:
        probe = max(dense, key=lambda b: b.auroc)
        if probe.auroc > best.auroc:
            out.append(
                f"Latent {best.latent} is {probe.auroc - best.auroc:.2f} AUROC behind a dense probe of the same "
                f"activations ({best.auroc:.2f} against {probe.auroc:.2f}): as a detector, the probe is the better "
                "choice."
            )
    if best is None:
        out += [
            f"The model does carry the distinction: a dense probe of the same activations reaches {probe.auroc:.2f} "
            f"({probe.low:.2f} to {probe.high:.2f}). That no single latent was confirmed is a finding about this "
            "dictionary, not about the model."
            for probe in sorted(dense, key=lambda b: -b.auroc)[:1]
            if probe.low > 0.5
        ]
    else:
        out.append(
            "The latent named is the confirmed one that stood out most on the discover half. That it passed was "
            "decided on the confirm texts, so an AUROC close to the bar leans upward."
        )
    if unseen:
        out.append(
            f"{unseen:.0%} of the held-out positives are seen by none of the confirmed latents at their frozen "
            "thresholds."
        )
    out += [
        "This is about text that the model reads. It says nothing about what the model does, and no latent was "
        "switched off: association, not cause.",
        "Only this kind of text was tested: another register, another language or a longer context may behave "
        "differently.",
        "Error is controlled within this concept, over its candidates, for 'associated' as for 'detects'. Of "
        "twenty audited concepts that no latent carries, about one would still yield a false confirmation.",
        "A text counts with a latent's largest activation over its tokens, and only latents that fire more on "
        "positives are tested.",
    ]
    if not has_corpus:
        out.append("No corpus documents were given, so the precision where the concept is rare is unknown.")
    return out


def _figure(candidate: Candidate) -> str:
    """AUROC with its 95 % interval: '0.91 (0.75–0.97)'."""
    return f"{candidate.auroc:.2f} ({candidate.low:.2f}–{candidate.high:.2f})"
