"""`sae.showing.Shown` as plain text and as HTML. Whatever a text, token or label holds is escaped, here alone."""

import html
import re

from sae.showing import Firing, Group, Shown, ShownToken, grouped

_UNSEEN = re.compile("[\\x00-\\x1f\\x7f-\\x9f\\u200b\\u200e\\u200f\\u2028-\\u202e\\u2060-\\u2069\\ufeff]")
_NAMES = {"\n": "↵", "\r": "␍", "\t": "⇥"}
_SINK = "attention sink or first position: training left it out"
_NOTHING = "nothing fires"

_STYLE = """
.sae-shown { font: 14px/1.6 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; max-width: 110ch; }
.sae-shown .text { white-space: pre-wrap; line-height: 2; unicode-bidi: isolate; overflow-wrap: anywhere; }
.sae-shown .text span { border-radius: 3px; padding: 2px 0; }
.sae-shown .sink { opacity: .55; }
.sae-shown table { border-collapse: collapse; margin: 14px 0 4px; font-variant-numeric: tabular-nums; }
.sae-shown th { text-align: left; font-weight: 600; opacity: .7; padding: 4px 18px 4px 0; }
.sae-shown td { text-align: left; padding: 4px 18px 4px 0; vertical-align: top; overflow-wrap: anywhere; }
.sae-shown td { border-top: 1px solid rgb(128 128 128 / .25); }
.sae-shown td.num, .sae-shown th.num { text-align: right; }
.sae-shown code { font: 12.5px/1.6 ui-monospace, "SF Mono", Menlo, "DejaVu Sans Mono", monospace; white-space: pre; }
.sae-shown bdi { unicode-bidi: isolate; }
.sae-shown summary { cursor: pointer; margin-top: 8px; }
"""


def visible(text: str) -> str:
    """Line breaks and tabs drawn; what turns directions, moves a cursor or cannot be seen named by its code point."""
    return _UNSEEN.sub(lambda found: _NAMES.get(found[0]) or f"⟨{ord(found[0]):04X}⟩", text)


def token_text(token: ShownToken) -> str:
    """A token's text, a leading space drawn."""
    return spaced(token.piece)


def spaced(piece: str) -> str:
    """`visible`, and a leading space drawn."""
    text = visible(piece)
    return "␣" + text[1:] if text.startswith(" ") else text or "∅"


def label_text(shown: Shown, latent: int) -> str:
    """A latent's label on one line, or what an unlabelled one fires on."""
    label = shown.labels.get(latent)
    if label is not None:
        return visible(label)
    words = "  ".join(spaced(word) for word in shown.top_tokens.get(latent, ())[:4])
    return f"unlabelled; on {words}" if words else "unlabelled"


def left_out(shown: Shown) -> str | None:
    """A sentence about what was not read."""
    if not shown.n_left_out:
        return None
    return f"The text is longer: its last {shown.n_left_out:,} tokens were not read. Raise max_tokens to read them."


def plain_text(shown: Shown) -> str:
    """A line for each firing that is shown, under the token that it belongs to."""
    groups = list(grouped(shown.tokens))
    width = min(24, max((len(token_text(group.tokens[0])) for group in groups), default=1))
    lines = []
    for group in groups:
        head = f"{group.tokens[0].position:>4}  {token_text(group.tokens[0]):<{width}}  "
        rest = " " * len(head)
        if not group.firings:
            lines.append(head + why_none(group))
        for i, firing in enumerate(group.firings):
            label = label_text(shown, firing.latent)
            lines.append(f"{rest if i else head}{firing.activation:>8.2f}  #{firing.latent:<6} {label}")
    note = left_out(shown)
    return "\n".join([*lines, note] if note else lines)


def why_none(group: Group) -> str:
    """Why no latent is shown for these tokens."""
    if not any(token.counted for token in group.tokens):
        return f"({_SINK})"
    n = sum(token.n_active for token in group.tokens)
    return f"({n} latents fire, none of them labelled)" if n else f"({_NOTHING})"


def html_page(shown: Shown, title: str) -> str:
    """A document of its own, without scripts, that needs no network."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">\n"
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{_escaped(title)}</title>\n"
        "<style>body { margin: 0 auto; max-width: 110ch; padding: 40px 24px 80px; }\n"
        "h1 { font: 600 26px/1.3 Georgia, 'DejaVu Serif', serif; overflow-wrap: anywhere; }</style>\n</head>\n"
        f"<body>\n<h1>{_escaped(title)}</h1>\n{html_fragment(shown)}\n</body>\n</html>\n"
    )


def html_fragment(shown: Shown) -> str:
    """The text in colours, its strongest latents, and every token in a table that is folded away."""
    note = left_out(shown)
    return (
        f'<div class="sae-shown"><style>{_STYLE}</style>\n'
        f'<p class="text" dir="auto">{_flow(shown)}</p>\n'
        + (f"<p>{_escaped(note)}</p>\n" if note else "")
        + _strongest_table(shown)
        + f"<details><summary>Every token</summary>\n{_token_table(shown)}</details></div>"
    )


def _flow(shown: Shown) -> str:
    most = max((f.activation for token in shown.tokens for f in token.firings), default=0.0)
    spans = []
    for group in grouped(shown.tokens):
        hint = "\n".join(f"{f.activation:.2f}  #{f.latent}  {label_text(shown, f.latent)}" for f in group.firings)
        strength = max((f.activation for f in group.firings), default=0.0) / most if most > 0 else 0.0
        look = f"background: rgb(255 150 0 / {0.08 + 0.42 * strength:.2f})" if group.firings else ""
        kind = "" if any(token.counted for token in group.tokens) else ' class="sink"'
        text = _escaped(_flowing(group.tokens[0].piece))
        spans.append(f'<span{kind} style="{look}" title="{_escaped(hint or why_none(group))}">{text}</span>')
    return "".join(spans)


def _flowing(piece: str) -> str:
    """As `visible`, but lines break where they break."""
    return visible(piece).replace("↵", "↵\n") if "\n" in piece else visible(piece)


def _strongest_table(shown: Shown) -> str:
    found = shown.strongest()
    if not found:
        return ""
    rows = "".join(
        f'<tr><td class="num">{_linked(shown, firing)}</td><td class="num">{firing.activation:.2f}</td>'
        f"<td><code>{_escaped(token_text(token))}</code></td>"
        f"<td><bdi>{_escaped(label_text(shown, firing.latent))}</bdi></td></tr>\n"
        for firing, token in found
    )
    return (
        '<table><thead><tr><th class="num">Latent</th><th class="num">Strongest</th><th>on</th><th>Label</th></tr>'
        f"</thead><tbody>\n{rows}</tbody></table>\n"
    )


def _token_table(shown: Shown) -> str:
    rows = []
    for group in grouped(shown.tokens):
        cells = "<br>".join(
            f"{firing.activation:.2f} &nbsp;{_linked(shown, firing)} "
            f"<bdi>{_escaped(label_text(shown, firing.latent))}</bdi>"
            for firing in group.firings
        )
        rows.append(
            f'<tr><td class="num">{group.tokens[0].position}</td>'
            f"<td><code>{_escaped(token_text(group.tokens[0]))}</code></td>"
            f"<td>{cells or _escaped(why_none(group))}</td></tr>\n"
        )
    return f"<table><tbody>\n{''.join(rows)}</tbody></table>\n"


def _linked(shown: Shown, firing: Firing) -> str:
    page = shown.page_of(firing.latent)
    return f"#{firing.latent}" if page is None else f'<a href="{_escaped(page)}">#{firing.latent}</a>'


def _escaped(text: str) -> str:
    return html.escape(text, quote=True)
