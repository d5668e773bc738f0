"""A base model's name ──► its weights and its tokenizer, on this machine or on the hub."""
