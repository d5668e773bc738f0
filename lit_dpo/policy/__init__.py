"""The policy: loading, adapters, attention, log-probs, generation. Its input is a ``PairBatch``."""
