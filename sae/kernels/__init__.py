"""The training path of sparse encoders: `cpu` computes it with few dense products, `reference` is its dense oracle."""
