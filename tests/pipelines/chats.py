"""Chat templates in the manner of known families, and a tokenizer for each."""

CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
)
"""SmolLM2's shape: a default system message, contents as they are; its BOS is <|im_start|>."""

INST = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{% set system = '<<SYS>>\n' + messages[0]['content'] | trim + '\n<</SYS>>\n\n' %}"
    "{% set turns = messages[1:] %}{% else %}{% set system = '' %}{% set turns = messages %}{% endif %}"
    "{% for message in turns %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate user/assistant') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + (system if loop.first else '') + message['content'] | trim "
    "+ ' [/INST]' }}"
    "{% else %}{{ ' ' + message['content'] | trim + ' ' + eos_token }}{% endif %}{% endfor %}"
)
"""Llama 2's shape: the system message stands inside the first user turn, contents are trimmed, roles must alternate."""

HEADERS = (
    "{{- bos_token }}{%- if strftime_now is defined %}{%- set date = strftime_now('%d %b %Y') %}"
    "{{- '<|start|>system<|end|>Today: ' + date + '\n' }}{%- endif %}"
    "{%- for message in messages %}{{- '<|start|>' + message['role'] + '<|end|>\n\n' + message['content'] | trim "
    "+ '<|eot|>' }}{%- endfor %}"
)
"""Llama 3's shape: headers, trimmed contents, and today's date."""

THOUGHTS = (
    "{%- for message in messages %}{%- set content = message.content %}"
    "{%- if message.role == 'assistant' and '</think>' in content and not loop.last %}"
    "{%- set content = content.split('</think>')[-1].lstrip('\n') %}{%- endif %}"
    "{{- '<|im_start|>' + message.role + '\n' + content + '<|im_end|>\n' }}{%- endfor %}"
)
"""Qwen 3's shape: the thoughts of earlier answers are left out, so a chat is no prefix of a longer one."""

SHOUTING = "{% for message in messages %}{{ '> ' + message['content'] | upper + '\n' }}{% endfor %}"
"""No known family's: it rewrites what was said."""

SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|start|>", "<|end|>", "<|eot|>"]


def letters(n=6000, *, bos="<s>", template=None):
    """A Hugging Face tokenizer with one token a character, whose id is the character's code plus the special ones."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {token: i for i, token in enumerate(SPECIAL)} | {chr(i): i + len(SPECIAL) for i in range(n)}
    backend = Tokenizer(models.WordLevel(vocab, unk_token=chr(0)))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    backend.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=bos, eos_token="</s>", extra_special_tokens=SPECIAL[2:]
    )
    tokenizer.chat_template = template
    return tokenizer
