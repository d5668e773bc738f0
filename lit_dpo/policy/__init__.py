"""Policy and reference: loading, attention, log-probs. Meets the data in ``PairBatch`` alone."""
