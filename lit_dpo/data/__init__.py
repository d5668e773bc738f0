"""The data pipeline, one file per step: sources, formats, tokenization, preparation, sampler, batch."""
