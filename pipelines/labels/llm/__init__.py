"""Labels by a language model behind an OpenAI-compatible endpoint, tested by a judge that may be another.

    examples.parquet (train) ──▶ explainer ──▶ label ──▶ judge ◀── held-out windows
                                     │                     │
                                     └──── ledger, budget ─┘   every call: asked once, paid once, accounted for

`transport` speaks HTTP, `endpoint` the protocol, `ledger` remembers every call, `client` puts them together with
retries and a budget, `questions` holds the prompts. `worker` labels a block of latents and knows no Ray.
"""
