"""Small random models, a small tokenizer and made-up pairs, for tests that need no real language."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from lit_dpo.data.batch import PairBatch
from lit_dpo.data.tokenization import TokenizedPair
from lit_dpo.policy.execution import Switch
from lit_dpo.policy.loading import load_policy
from lit_dpo.policy.policy import Layout, Policy

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WORDS = "the cat sat on a mat and then it ran away over green hills while rain fell in april on every roof".split()
SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 2048,
}


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with ChatML."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([" ".join(WORDS)], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|im_end|>")
    fast.chat_template = CHATML
    return fast


def save_tiny_base(folder: Path, config: Any = None) -> str:
    """A random model (a Llama by default) with the tiny tokenizer, as a local folder."""
    tokenizer = tiny_tokenizer()
    if config is None:
        config = LlamaConfig(**SIZES, vocab_size=len(tokenizer), tie_word_embeddings=True, initializer_range=0.2)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def tiny_policy(base: str, layout: Layout = "auto", recompute: Switch = False, **options: Any) -> Policy:
    """A policy, by default in float32 on the CPU, whose adapters are not zero."""
    torch.manual_seed(1)
    lora = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    where: dict[str, Any] = {"dtype": torch.float32, "device": torch.device("cpu")}
    arguments = {"quantization": None, "lora": lora, "adapter": None, **where, **options}
    model = load_policy(base, **arguments)
    wake_adapters(model)
    return Policy(model, layout, recompute)


def wake_adapters(model: torch.nn.Module, scale: float = 0.02) -> None:
    """Gives adapters, whose B matrices start at zero, values that depend on the names of the matrices alone."""
    adapters = sorted((name, p) for name, p in model.named_parameters() if ".default." in name and p.dim() == 2)
    for index, (name, parameter) in enumerate(adapters):
        generator = torch.Generator().manual_seed(index)
        size = scale if "lora_B" in name else parameter.shape[1] ** -0.5
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * size)


def random_pairs(sizes: Sequence[tuple[int, ...]], vocabulary: int = 300, seed: int = 0) -> list[TokenizedPair]:
    """Pairs, or ranked lists, of random tokens with the given lengths of prompt and responses, best to worst."""
    generator = torch.Generator().manual_seed(seed)

    def ids(length: int) -> list[int]:
        return torch.randint(2, vocabulary, (length,), generator=generator).tolist()

    pairs = []
    for row, lengths in enumerate(sizes):
        prompt, chosen, *between, rejected = map(ids, lengths)
        pairs.append(TokenizedPair(prompt, chosen, rejected, "made up", row, tuple(between)))
    return pairs


def random_batch(sizes: Sequence[tuple[int, ...]], **options: Any) -> PairBatch:
    """The same as a batch."""
    return PairBatch.from_pairs(random_pairs(sizes, **options))


def made_up_rows(number: int) -> list[dict[str, Any]]:
    """Rows in the schema of UltraFeedback binarized, all different, of uneven lengths."""
    rows = []
    for row in range(number):
        prompt = " ".join(WORDS[(row * 3 + word) % len(WORDS)] for word in range(3 + row % 5)) + f" {row}?"
        chosen = " ".join(WORDS[(row + word) % len(WORDS)] for word in range(2 + row % 7))
        rejected = " ".join(WORDS[(row * 5 + word) % len(WORDS)] for word in range(4 + row % 4)) + "!"
        user = {"role": "user", "content": prompt}
        rows.append(
            {
                "prompt": prompt,
                "chosen": [user, {"role": "assistant", "content": chosen}],
                "rejected": [user, {"role": "assistant", "content": rejected}],
            }
        )
    return rows


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> str:
    """Writes rows as JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)
