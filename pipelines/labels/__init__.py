"""Labels: what each latent seems to detect, said as a rule that can be run, and how it did on documents it never saw.

    tokens ──▶ families (categorical views of a token) ─┐
    latent activations ──▶ firings ──▶ contexts         ├──▶ fitting (on train) ──▶ rules ──▶ testing (held-out)
    decoder rows ──▶ logit lens                         ┘

`stage.label_dictionary` runs the stage on a store; `labelling.label_latents` is the same on arrays.
"""
