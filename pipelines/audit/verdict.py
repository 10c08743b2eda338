"""From numbers to claims: what each latent is credited with, the verdict in a sentence, and what must not be concluded.

The ladder, lowest first. `mentioned` needs no evidence and gives none; rungs above `associated` need those below:

    not_confirmed   no evidence on the confirm part
    mentioned       none either, but its label holds a word of the concept
    associated      Holm-adjusted permutation p on the confirm part at or below alpha
    detects         the lower bound at its level in the order of candidates is above `detects_above`, the AUROC above
                    what the same search reaches on shuffled labels, and neither words nor length explain it
    robust          the same bound, against hard negatives alone and on the out-of-distribution set
    causal          robust, and changing it changes the outcome beyond its controls (`causal.records.with_causal`)

Both tested rungs are controlled over the candidates of one concept: the chance that any of them wrongly reaches one is
at most about alpha (Holm for the first, the fallback procedure for the second; `robust` asks more of the same latents).
"""

from collections.abc import Sequence

from pipelines.audit.causal.records import UNTOUCHED
from pipelines.audit.concepts import Concept
from pipelines.audit.result import Baseline, Candidate, Claim, Completeness, Level, PowerTable, Verdict

RANK: dict[Claim, int] = {
    "not_confirmed": 0,
    "mentioned": 0,
    "associated": 1,
    "detects": 2,
    "robust": 3,
    "causal": 4,
}
LEVEL: dict[int, Level] = {0: "nothing_found", 1: "associated", 2: "detects", 3: "robust", 4: "causal"}
CLOSE = 0.02
"""Words explain a concept if they come this close to the model."""


def claim_of(
    candidate: Candidate, *, null_upper: float, confounded: bool, reused: int, alpha: float, detects_above: float
) -> Claim:
    """The highest rung that a candidate reaches; on confirm texts that were opened before, not above 'associated'."""
    if candidate.p_holm > alpha:
        return "mentioned" if candidate.mentions else "not_confirmed"
    strong = candidate.low_familywise > detects_above and candidate.auroc > null_upper
    if not strong or confounded or reused:
        return "associated"
    elsewhere = (candidate.hard_negatives, candidate.ood)
    return "robust" if all(part is not None and part.low_tested > detects_above for part in elsewhere) else "detects"


def headline(candidates: Sequence[Candidate]) -> Candidate | None:
    """The latent that the verdict names: of those on the highest rung, the one with the largest z on the discover part.

    Never the one with the largest confirm AUROC: the maximum of several estimates overstates the truth.
    """
    reached = max((RANK[c.claim] for c in candidates), default=0)
    top = [c for c in candidates if RANK[c.claim] == reached]
    return max(top, key=lambda c: c.discover_z) if reached else None


def words_explain(
    concept: Concept, baselines: Sequence[Baseline], candidates: Sequence[Candidate], alpha: float
) -> bool:
    """Whether the audit is CONFOUNDED: words or length surely beat chance and come within 0.02 of the model.

    What the model offers is the best of the dense probes and of the latents that Holm confirms. Where there are hard
    negatives, they alone are what both are compared on. Never for topics, a matter of vocabulary by nature.
    """
    offered = [b.auroc if b.hard_auroc is None else b.hard_auroc for b in baselines if b.name.startswith("dense")]
    offered += [
        c.auroc if c.hard_negatives is None else c.hard_negatives.auroc for c in candidates if c.p_holm <= alpha
    ]
    surface = [b for b in baselines if b.name in ("bag_of_words", "length") and b.low > 0.5]
    return concept.topic is None and any(
        (b.auroc if b.hard_auroc is None else b.hard_auroc) >= max(offered, default=0.0) - CLOSE for b in surface
    )


def about(concept: Concept) -> str:
    """What a latent is said to respond to: text, unless the concept is one of the model's own behaviour."""
    title = concept.display if concept.topic is not None else concept.display.lower()
    return f"text about {title}" if concept.kind == "text" else f"this model's own responses that show {title}"


def verdict_on(
    concept: Concept, candidates: Sequence[Candidate], *, confounded: bool, reused: int, power: PowerTable
) -> Verdict:
    """The answer for one concept: the latent that `headline` names, or the effect that would have been seen."""
    best = headline(candidates)
    if best is None:
        level: Level = "nothing_found"
        sentence = f"No latent was confirmed to respond to {about(concept)}. {_would_have_seen(power)}"
    else:
        level = LEVEL[RANK[best.claim]]
        said = {
            "associated": "responds to {}, on texts that had no part in choosing it: AUROC {}; that it detects them "
            "is not shown.",
            "detects": "responds to {} and detects it, on texts that had no part in choosing it: AUROC {}.",
            "robust": "responds to {} and detects it, also among hard negatives and on another kind of text, none of "
            "which had a part in choosing it: AUROC {}.",
        }[level]
        sentence = f"{name_of(best, candidates)} " + said.format(about(concept), _figure(best))
        if confounded:
            sentence += " Words alone separate these texts as well as the model does, so no stronger claim is possible."
        if reused:
            sentence += f" The confirm texts had been opened {reused} time(s) before, so no stronger claim is possible."
    return Verdict(
        level=level,
        confounded=confounded,
        reused=reused,
        sentence=sentence,
        dictionary=best.dictionary if best else None,
        latent=best.latent if best else None,
        auroc=best.auroc if best else None,
        low=best.low if best else None,
        high=best.high if best else None,
        minimum_detectable_auroc=power.smallest_associated,
    )


def name_of(candidate: Candidate, candidates: Sequence[Candidate]) -> str:
    """'Latent 7', or 'Latent 7 of wide' where several dictionaries have candidates."""
    several = len({c.dictionary for c in candidates}) > 1
    return f"Latent {candidate.latent}" + (f" of {candidate.dictionary}" if several else "")


def limits_of(
    concept: Concept,
    candidates: Sequence[Candidate],
    baselines: Sequence[Baseline],
    completeness: Completeness,
    *,
    confounded: bool,
    reused: int,
    has_corpus: bool,
) -> list[str]:
    """What the reader must not conclude, in plain words, most important first."""
    best = headline(candidates)
    dense = max((b for b in baselines if b.name.startswith("dense")), key=lambda b: b.auroc, default=None)
    out = _stamps(concept, confounded=confounded, reused=reused)
    if dense and best and dense.auroc > best.auroc:
        out.append(
            f"Latent {best.latent} is {dense.auroc - best.auroc:.2f} AUROC behind a dense probe of the same "
            f"activations ({best.auroc:.2f} against {dense.auroc:.2f}): as a detector, the probe is the better choice."
        )
    if dense and best is None and dense.low > 0.5:
        out.append(
            f"The model does carry the distinction: a dense probe of the same activations reaches {dense.auroc:.2f} "
            f"({dense.low:.2f} to {dense.high:.2f}). That no single latent was confirmed is a finding about this "
            "dictionary, not about the model."
        )
    if best is not None:
        out.append(
            "The latent named is the confirmed one that stood out most on the discover part. That it passed was "
            "decided on the confirm texts, so an AUROC close to the bar leans upward."
        )
        random = next((b for b in baselines if b.name == "random_dictionary"), None)
        if random and random.high > best.auroc:
            out.append(
                f"The best of as many random features reaches {random.auroc:.2f} ({random.low:.2f} to "
                f"{random.high:.2f}): that some direction responds to such text is no merit of this dictionary."
            )
    out += _incomplete(completeness)
    if best is not None and best.hard_negatives is None and concept.topic is None:
        out.append("There are no hard negatives, so a latent for the subject passes as one for the concept.")
    if best is not None and best.ood is None:
        out.append("There is no out-of-distribution set, so nothing here is called robust.")
    if concept.kind == "text":
        out.append("This is about text that the model reads. It says nothing about what the model does.")
    out.append(UNTOUCHED)
    out += [
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


def _stamps(concept: Concept, *, confounded: bool, reused: int) -> list[str]:
    out = []
    if confounded:
        out.append(
            "CONFOUNDED: a bag of words, or length alone, separates the confirm texts as well as the model does. No "
            "latent can be credited with more than association; harder negatives are needed."
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
    return out


def _incomplete(completeness: Completeness) -> list[str]:
    out = []
    if completeness.unseen_share:
        out.append(
            f"{completeness.unseen_share:.0%} of the held-out positives are seen by none of the confirmed latents at "
            "their frozen thresholds."
        )
    absorbed = completeness.absorption
    if absorbed and absorbed.fraction >= 0.1:
        out.append(
            f"Absorption: {absorbed.fraction:.0%} of what the dense probe sees in the positives that it finds is "
            "carried by latents that are not among the confirmed ones."
        )
    return out


def _would_have_seen(power: PowerTable) -> str:
    if power.smallest_associated is None:
        return "This design is too small: not even a nearly perfect latent would be confirmed nine times of ten."
    return (
        f"A latent with a true AUROC of {power.smallest_associated:.2f} or more would have been seen: in simulations "
        "of this design with the observed firing rates it is confirmed nine times of ten."
    )


def _figure(candidate: Candidate) -> str:
    """AUROC with its 95 % interval: '0.91 (0.75–0.97)'."""
    return f"{candidate.auroc:.2f} ({candidate.low:.2f}–{candidate.high:.2f})"
