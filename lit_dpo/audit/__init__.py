"""What a data set is like before it is trained on: facts, their cost, verdicts, and pages that show them."""
