"""``python -m lit_dpo explain``: which words of a pair a preference was learned from."""

import json
import os
import sys
from pathlib import Path

from lit_dpo.evaluation.trained import TrainedQuantization, find_trained
from lit_dpo.files.atomic import atomic_write, finite
from lit_dpo.files.console import say
from lit_dpo.report.explain import explained, explanation, own_pair, place_of_row
from lit_dpo.report.page import token_page


def explain(
    ckpt_path: str | None = None,
    adapter: str | None = None,
    row: int | None = None,
    source: str | None = None,
    prompt: str | None = None,
    chosen: str | None = None,
    rejected: str | None = None,
    output: str | None = None,
    base: str | None = None,
    quantization: TrainedQuantization = "auto",
    trust_remote_code: bool = False,
) -> None:
    """Shows each token's share of the implicit reward of one pair: a held-out one, or one of your own.

    Args:
        ckpt_path: Checkpoint of a run. Its model and its held-out data are used.
        adapter: Folder or hub id of an exported adapter, instead of a checkpoint.
        row: Row number of a held-out pair in its source, counted from 0.
        source: Data with the held-out pair, in any form that data.source takes; by default that of the training.
        prompt: A prompt of your own, instead of a row.
        chosen: The better answer to it.
        rejected: The worse answer to it.
        output: File to write too: .html for a page, .json for the numbers.
        base: Base of ``adapter``, if it is not where its configuration says.
        quantization: Quantization of the base of ``adapter`` in training; ``auto`` is as its run or its export tells.
        trust_remote_code: Whether to run model code that comes with the base model's repository.

    Raises:
        ValueError: If neither a row nor a pair of one's own is given, or both.
        FileNotFoundError: If a file or folder does not exist.
    """
    own = {"--prompt": prompt, "--chosen": chosen, "--rejected": rejected}
    given = [name for name, value in own.items() if value is not None]
    if (row is None) == (not given):
        raise ValueError("Give either --row NUMBER of a held-out pair, or --prompt, --chosen and --rejected.")
    if given and (len(given) < 3 or source is not None):
        lacking = [name for name in own if name not in given]
        raise ValueError(
            f"A pair of your own needs {' and '.join(lacking)} too." if lacking else "--source goes with --row alone."
        )
    if output is not None and Path(output).suffix not in (".html", ".json"):
        raise ValueError(f"--output {output}: the name must end in .html or .json.")
    trained = find_trained(
        ckpt_path, adapter, base=base, quantization=quantization, trust_remote_code=trust_remote_code
    )
    if row is None:
        assert prompt is not None
        assert chosen is not None
        assert rejected is not None
        pairs, place = own_pair(trained, prompt, chosen, rejected), 0
    else:
        pairs = trained.held_out(source)
        place = place_of_row(pairs, row)
    view = explained(trained, pairs, place)
    say(explanation(view, color=sys.stdout.isatty() and "NO_COLOR" not in os.environ))
    if output is not None:
        plain = finite(view.without_folders().to_dict())
        is_page = output.endswith(".html")
        text = token_page(view) if is_page else json.dumps(plain, ensure_ascii=False, indent=2) + "\n"
        with atomic_write(Path(output)) as beside:
            beside.write_text(text, encoding="utf-8", errors="backslashreplace")
        say(f"Wrote {output}")
