"""The data pipeline, one file per step: from sources, formats and rendering to pairs, batches and their sampler."""
