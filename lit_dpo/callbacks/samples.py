"""ComparisonSamples: prints base and aligned answers to held-out prompts, side by side."""

import shutil
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from lit_dpo.files.console import say
from lit_dpo.policy.generation import Prompt, compare, markdown, side_by_side
from lit_dpo.training.run_dir import run_dir


class ComparisonSamples(Callback):
    """Answers held-out prompts at the end of training, prints them and writes ``samples.md``.

    Args:
        num_prompts: Number of held-out prompts to answer; 0 for none.
        max_new_tokens: Maximum number of tokens of an answer.
    """

    def __init__(self, num_prompts: int = 4, max_new_tokens: int = 64) -> None:
        self.num_prompts, self.max_new_tokens = num_prompts, max_new_tokens

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Generates on the first rank, while the others wait. All take part where the base is split over them."""
        folder = run_dir(trainer)
        pairs = getattr(getattr(trainer, "datamodule", None), "val_pairs", None)
        module: Any = pl_module
        if self.num_prompts > 0 and pairs is not None and (trainer.is_global_zero or module.policy.sharded):
            prompts = [Prompt(*pairs.prompt(index)) for index in range(min(self.num_prompts, len(pairs)))]
            comparisons = compare(module.policy, module.tokenizer, prompts, max_new_tokens=self.max_new_tokens)
            module.policy.release_initial()
            if trainer.is_global_zero:
                say(side_by_side(comparisons, min(120, shutil.get_terminal_size((100, 24)).columns)))
                folder.mkdir(parents=True, exist_ok=True)
                (folder / "samples.md").write_text(markdown(comparisons), encoding="utf-8")
        trainer.strategy.barrier("samples")
