"""What a run learned, and which of its pairs are wrong: pages, and what they are made from."""
