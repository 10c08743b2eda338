"""Safety audits: which latents carry a concept, how sure are we, and what would we have missed."""
