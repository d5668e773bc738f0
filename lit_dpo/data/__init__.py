"""The way of the data, a file a step: sources, pairs, tokenization, batch; the sampler says which and in what order."""
