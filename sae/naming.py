"""Hook names: the path of a module and the side of it, and their aliases in other tools.

    "model.layers.8"             output of the ninth layer, the residual stream after it (":output" may be written out)
    "model.layers.8:input"       what the ninth layer receives
    "blocks.8.hook_resid_post"   the same place as the first, as TransformerLens names it

`find_hook` accepts any of these names on any model that has the place: a dictionary trained on "model.layers.8"
attaches to a TransformerLens model, and one of SAELens trained on "blocks.8.hook_resid_post" to a Hugging Face model.
"""

import difflib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from torch import nn

Side = Literal["input", "output"]


@dataclass(frozen=True)
class Family:
    """How one kind of model names its places."""

    containers: tuple[str, ...]
    """Paths of the list of layers; the first is written where only the family is known."""
    markers: tuple[str, ...]
    """Modules inside a layer that tell the family from others with the same container."""
    absent: tuple[str, ...]
    """Modules that a layer of this family does not have."""
    layer: Mapping[str, str]
    """From TransformerLens' name inside a block to the hook name inside a layer; "" is the layer's output, and a bar
    stands before another name that some versions have instead."""
    embed: tuple[str, ...]
    """Where the token embeddings come out."""


_CAUSAL = ("model.layers", "layers", "model.language_model.layers", "language_model.model.layers")
_STREAM = {"hook_resid_pre": ":input", "hook_resid_post": ""}

FAMILIES: Mapping[str, Family] = {
    # Llama, Mistral, Qwen, SmolLM: the norm before the MLP reads the stream between attention and MLP.
    "llama": Family(
        _CAUSAL,
        ("self_attn.o_proj", "post_attention_layernorm"),
        ("post_feedforward_layernorm",),
        _STREAM
        | {
            "hook_resid_mid": "post_attention_layernorm:input",
            "hook_attn_out": "self_attn",
            "hook_mlp_out": "mlp",
            "attn.hook_z": "self_attn.o_proj:input",
            "mlp.hook_in": "mlp:input",
            "mlp.hook_post": "mlp.down_proj:input",
        },
        ("model.embed_tokens", "embed_tokens", "model.language_model.embed_tokens"),
    ),
    # Gemma 2 and 3 norm what attention and MLP add, and TransformerLens' hook_*_out come after those norms.
    "gemma": Family(
        _CAUSAL,
        ("self_attn.o_proj", "pre_feedforward_layernorm", "post_feedforward_layernorm"),
        (),
        _STREAM
        | {
            "hook_resid_mid": "pre_feedforward_layernorm:input",
            "hook_attn_out": "post_attention_layernorm",
            "hook_mlp_out": "post_feedforward_layernorm",
            "attn.hook_z": "self_attn.o_proj:input",
            "mlp.hook_in": "mlp:input",
            "mlp.hook_post": "mlp.down_proj:input",
        },
        (),
    ),
    "gpt2": Family(
        ("transformer.h", "h"),
        ("attn.c_proj", "mlp.c_proj"),
        (),
        _STREAM
        | {
            "hook_resid_mid": "ln_2:input",
            "hook_attn_out": "attn",
            "hook_mlp_out": "mlp",
            "attn.hook_z": "attn.c_proj:input",
            "mlp.hook_in": "mlp:input",
            "mlp.hook_post": "mlp.c_proj:input",
        },
        ("transformer.wte", "wte"),
    ),
    # Pythia: attention and MLP read the same stream, so that there is no resid_mid.
    "neox": Family(
        ("gpt_neox.layers", "layers"),
        ("attention.dense", "mlp.dense_4h_to_h"),
        (),
        _STREAM
        | {
            "hook_attn_out": "attention",
            "hook_mlp_out": "mlp",
            "attn.hook_z": "attention.dense:input",
            "mlp.hook_in": "mlp:input",
            "mlp.hook_post": "mlp.dense_4h_to_h:input",
        },
        ("gpt_neox.embed_in", "embed_in"),
    ),
    "transformer_lens": Family(
        ("blocks",),
        ("hook_resid_post",),
        (),
        {
            name: name
            for name in (
                *("hook_resid_pre", "hook_resid_mid", "hook_resid_post", "hook_attn_out", "hook_mlp_out"),
                *("attn.hook_z", "mlp.hook_post"),
            )
        }
        | {"mlp.hook_in": "mlp.hook_in|mlp:input"},  # HookedTransformer has no hook point there
        ("hook_embed",),
    ),
    # Any other stack of layers: what goes in and what comes out is the residual stream.
    "other": Family((*_CAUSAL, "transformer.h", "gpt_neox.layers", "model.decoder.layers"), (), (), _STREAM, ()),
}


class Place(NamedTuple):
    """A place in a language model, whatever its modules are called."""

    name: str
    """TransformerLens' name inside a block, such as "hook_resid_post", or "hook_embed"."""
    layer: int | None
    """None for the embeddings."""


class Hook(NamedTuple):
    """A hook name that was found in a model."""

    path: str
    """The module's path in this model."""
    side: Side
    module: nn.Module


def split_hook_name(hook_name: str) -> tuple[str, Side]:
    """The module path of a hook name and the side of the module: "a.b" and "a.b:output" are its output.

    Raises: ValueError if what follows the colon is neither "input" nor "output".
    """
    path, colon, side = hook_name.partition(":")
    if side == "input":
        return path, "input"
    if side == "output" or not colon:
        return path, "output"
    raise ValueError(f"A hook name ends in `:output` or `:input`, got {hook_name!r}. Drop or correct `:{side}`.")


def place_of(hook_name: str, family: str | None = None) -> Place | None:
    """The place that a hook name means; None if the table does not have it.

    Args:
        family: a key of `FAMILIES`; by default the first one that has the name. Llama and Gemma share paths, and
            "model.layers.0.self_attn" is `hook_attn_out` in the former only.
    """
    name = hook_name.removesuffix(":output")
    for key, entry in FAMILIES.items():
        if family not in (None, key):
            continue
        if name in entry.embed:
            return Place("hook_embed", None)
        for container in entry.containers:
            found = re.fullmatch(rf"{re.escape(container)}\.(\d+)(?:\.(.+)|(:input))?", name)
            if found is None:
                continue
            within = found[2] or found[3] or ""
            for place, path in entry.layer.items():
                if within in path.split("|"):
                    return Place(place, int(found[1]))
    return None


def hook_names_of(place: Place, family: str) -> Iterator[str]:
    """The hook names of a place in models of a family, the usual one first; none where the family lacks the place."""
    entry = FAMILIES[family]
    if place.layer is None:
        yield from entry.embed
    elif place.name in entry.layer:
        for within in entry.layer[place.name].split("|"):
            for container in entry.containers:
                yield f"{container}.{place.layer}{'' if within.startswith(':') or not within else '.'}{within}"


def to_transformer_lens(hook_name: str, family: str | None = None) -> str:
    """TransformerLens' name of a hook: "model.layers.8" is "blocks.8.hook_resid_post".

    Args:
        family: see `place_of`.
    Raises: ValueError if TransformerLens has no name for it.
    """
    return translate(hook_name, "transformer_lens", family)


def from_transformer_lens(name: str, family: str = "llama") -> str:
    """The hook name of a TransformerLens name in models of a family: "blocks.8.hook_resid_post" is "model.layers.8".

    Raises: ValueError if that family has no module there.
    """
    return translate(name, family, None)


def translate(hook_name: str, family: str, source: str | None = None) -> str:
    """The usual name of a hook in models of another family.

    Args:
        family: a key of `FAMILIES`, what to translate to.
        source: the family that `hook_name` belongs to; by default the first that has the name.
    Raises: ValueError if the name is not in the table, or the family has no such place.
    """
    place = place_of(hook_name, source)
    names = [] if place is None else list(hook_names_of(place, family))
    if not names:
        known = ", ".join(f"blocks.N.{name}" for name in FAMILIES["transformer_lens"].layer)
        raise ValueError(
            f"The hook {hook_name!r} has no name of the family {family!r}. Places with names in several families: "
            f"{known}, hook_embed. Pass the module's own path instead."
        )
    return names[0]


def torch_module(model: Any) -> nn.Module:
    """The PyTorch module of `model`: itself, or what an nnsight model wraps.

    Raises: TypeError if there is none.
    """
    if isinstance(model, nn.Module):
        return model
    wrapped = getattr(model, "_module", None)
    if isinstance(wrapped, nn.Module):
        return wrapped
    raise TypeError(
        f"A model must be a torch.nn.Module or an nnsight model, got {type(model).__name__}. Pass the module itself."
    )


def _modules(root: nn.Module) -> dict[str, nn.Module]:
    """All modules by path, and by the further names that TransformerLens has for its hook points.

    A TransformerLens bridge keeps the wrapped layers under private paths; `hook_dict` has the public ones.
    """
    named: dict[str, nn.Module] = dict(root.named_modules())
    points = getattr(root, "hook_dict", None)
    return named | dict(points) if isinstance(points, Mapping) else named


def family_of(model: Any) -> str | None:
    """The family whose modules `model` has; None if none fits."""
    modules = _modules(torch_module(model))
    for key, entry in FAMILIES.items():
        for container in entry.containers:
            first = f"{container}.0"
            present = first in modules and all(f"{first}.{marker}" in modules for marker in entry.markers)
            if present and not any(f"{first}.{name}" in modules for name in entry.absent):
                return key
    return None


def find_hook(model: Any, hook_name: str) -> Hook:
    """The module and side that `hook_name` means in this model.

    Args:
        model: a module, or an nnsight model.
        hook_name: a path as in `model.named_modules()` or TransformerLens' `model.hook_dict`, optionally followed by
            ":output" (the default) or ":input"; or the name of the same place in another family of models.
    Raises: ValueError naming the nearest module paths if there is no such module.
    """
    root = torch_module(model)
    path, side = split_hook_name(hook_name)
    modules = _modules(root)
    if path in modules and path:
        return Hook(path, side, modules[path])
    family = family_of(root)
    for source in FAMILIES:
        place = place_of(hook_name, source)
        if place is None or family is None:
            continue
        for candidate in hook_names_of(place, family):
            path_here, side_here = split_hook_name(candidate)
            if path_here in modules:
                return Hook(path_here, side_here, modules[path_here])
    near = difflib.get_close_matches(path, [name for name in modules if name], n=5, cutoff=0.3)
    raise ValueError(
        f"A hook name must be the path of a module of {type(root).__name__}, got {path!r}. "
        f"Nearest: {', '.join(near) or 'none'}. `model.named_modules()` lists all."
    )
