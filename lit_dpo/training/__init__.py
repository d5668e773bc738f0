"""Everything around an optimizer step: metrics, checks for finite losses, checkpoints, exact resume, run folder."""
