"""The parts of a training worker: its job, the batches, the SAEs that share them, and what is written down."""
