"""A dictionary of somebody else's, evaluated, labelled or audited in one command, without a config of one's own.

    sae evaluate --dictionary google/gemma-scope-2b-pt-res/layer_12/… --model google/gemma-2-2b --text texts.jsonl

The stages are those of any run: a config is made that starts from the dictionary, collects as many tokens as asked for,
and keeps them in a run directory. Nothing requires that the dictionary was trained here or says where it comes from.
"""

import re
from pathlib import Path
from typing import Any

from pipelines.errors import UsageError
from sae import Crosscoder, Dictionary, Transcoder

TOKENS = 65_536
"""Tokens that are collected by default: enough for the 8,192 of the spliced passes and some firings of most latents."""


def config_for(
    dictionary: str, model: str, text: str, *, hook: str | None = None, tokens: int = TOKENS, name: str | None = None
) -> dict[str, Any]:
    """The config of a run that starts from a dictionary.

    Args:
        dictionary: a folder, or a name that `pipelines.hub` knows.
        hook: where it reads, if it does not say, or the model names it otherwise.
        text: a file, a folder of files, or a Hugging Face dataset.
    Raises:
        UsageError: the dictionary cannot be loaded, or nobody says where it reads.
    """
    import pipelines.hub  # noqa: F401  for names that are no folder

    try:
        found = Dictionary.load(dictionary, hook_name=hook)
    except (ValueError, FileNotFoundError) as error:
        raise UsageError(f"--dictionary: {error}") from error
    if not found.hook_names:
        raise UsageError(
            f"the dictionary {dictionary} does not say where it reads: give --hook, such as model.layers.8"
        )
    hooks = list(found.hook_names)
    spec: dict[str, Any] = {"d_sae": found.d_sae}
    if isinstance(found.sae, Transcoder):
        if len(hooks) < 2:
            raise UsageError(f"the transcoder {dictionary} does not say which hook it predicts: write a config with it")
        spec |= {"architecture": "transcoder", "hook": hooks[0], "target_hook": hooks[1]}
    elif isinstance(found.sae, Crosscoder):
        raise UsageError(f"{dictionary} is a crosscoder, which reads several models or hooks: write a config with them")
    folder = Path(dictionary).resolve() if Path(dictionary).exists() else None
    label = name or re.sub(r"[^A-Za-z0-9._-]+", "-", folder.name if folder else dictionary).strip("-.")
    is_path = Path(text).exists() or text.startswith("package://")
    return {
        "name": label or "dictionary",
        "model": {"source": model},
        "text": [{"path": text} if is_path else {"dataset": text}],
        "hooks": hooks,
        "collect": {"n_tokens": tokens, "context_length": _context(found), "heldout_fraction": 0.5},
        "saes": {"main": spec},
        "dictionary": {"path": str(folder) if folder else dictionary},
    }


def _context(dictionary: Dictionary) -> int:
    """The context that it was trained on, within what a first look should cost."""
    recorded = dictionary.metadata.get("context_size")
    return min(int(recorded), 256) if isinstance(recorded, int) and recorded > 0 else 128
