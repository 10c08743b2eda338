"""The commented config that `sae init` writes."""

import json
import re
from pathlib import Path

_TEMPLATE = """\
# A sae-pipelines run. Every key that is not here has a default; `sae run` writes all of them to config.yaml in the run
# directory.
#
#   sae run {file}                     every stage; stop it any time, the same command continues
#   sae run {file} --set train.lr=5e-4 --out runs/other

name: {name}              # the run directory is runs/{name} unless --out says otherwise
seed: 0

model:
  source: {model}         # Hugging Face id, folder, or .gguf file
  # revision: main        # pin a commit for results that others can repeat
  dtype: bfloat16         # of the forward pass and of the stored activations

text:                     # a list of weighted sources; `weight` is each one's share of the tokens
{text}
    # messages_field: messages       in place of text_field: chats, [{{role, content}}, …], through the chat template
    # tokens_field: input_ids        in place of text_field: token ids of this model's tokenizer
    # topic_field: topic             topics are mixed evenly, and can be audited
    # columns: [url, licence]        kept in documents.parquet

hooks:                    # module paths, `:output` by default; several are collected in one forward pass
  - {hook}
  # In a Llama-like model, N being the layer:
  #   model.layers.N                                   residual stream after the layer
  #   model.layers.N.post_attention_layernorm:input    residual stream between attention and MLP
  #   model.layers.N.mlp:input, model.layers.N.mlp     what the MLP reads and what it writes
  #   model.layers.N.self_attn.o_proj:input            attention heads, one after another, before they are mixed

collect:
  n_tokens: 10_000_000    # 2 * d_in bytes each in bfloat16
  context_length: 512
  heldout_fraction: 0.05  # documents that training never sees
  n_workers: 1            # Ray actors that run the model
  cpus_per_worker: 2
  gpus_per_worker: 0      # 1 on a machine with GPUs

saes:
  main:                   # the name of the dictionary's folder
    architecture: batchtopk
    expansion_factor: 8   # or d_sae: 16384
    k: 32                 # active latents a token, on average

train:
  n_tokens: 10_000_000    # more than collected means several epochs
  batch_size: 4096
  lr: 1e-3
  num_workers: 1
  use_gpu: false
  # select: {{role: [assistant]}}   train on these tokens only; by source, role or turn; evaluate, label and audit too

audit:
  concepts: [deception, violence, privacy]   # shipped names, or paths of concept files
"""


def commented_config(model: str, hook: str, text: str, file: str = "sae.yaml") -> str:
    """A config for a model, a hook and a text, with a comment beside each choice."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", model.rstrip("/").rpartition("/")[2]).strip("-.") or "run"
    # JSON strings are YAML strings: names with colons or quotes stay what they are.
    is_path = re.search(r"\.(txt|jsonl|json|parquet)$", text) or text.startswith("package://") or Path(text).is_dir()
    if is_path:
        source = f"  - path: {json.dumps(text)}\n    text_field: text"
    else:
        source = f"  - dataset: {json.dumps(text)}  # needs the extra `hub`\n    split: train\n    text_field: text"
    return _TEMPLATE.format(
        name=json.dumps(name) if not name[0].isalpha() else name,
        model=json.dumps(model),
        hook=json.dumps(hook),
        text=source,
        file=file,
    )
