"""Runs the command line with random settings: ``python -m tests.faults.fuzz --cases 2000``.

Each case is a run of a tiny model with one to three settings, right and wrong ones, on the command line or in a file.
It must end well, or with one line that says what is wrong. A traceback counts as a failure, and is printed.
"""

import argparse
import contextlib
import io
import logging
import os
import random
import shutil
import tempfile
import traceback
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import yaml

from lit_dpo import objectives
from lit_dpo.cli.app import main as run
from lit_dpo.cli.errors import line_for

NUMBERS = ["-1", "0", "1", "2", "3", "7", "0.5", "1e-3", "1e9", "nan", "inf", "null", "abc", "[]", "{}", "true", ""]
SWITCHES = ["true", "false", "auto", "null", "maybe", "1"]
CLASSES = [*objectives.__all__, "AnotherModel", "MovingReference", "Nothing", "torch.optim.SGD", "os.system"]
STRATEGIES = ["auto", "ddp", "sharded", "fsdp", "deepspeed", "xla", "a.b.C", "null", ""]
OPTIONS: dict[str, list[str]] = {
    "model.base": ["nowhere", "", "package:nothing", "/", "org/none", "null", "pairs.jsonl"],
    "model.objective": CLASSES,
    "model.objective.beta": NUMBERS,
    "model.objective.label_smoothing": NUMBERS,
    "model.objective.objectives": ["[Sigmoid, SFT]", "[]", "Sigmoid", "[IPO]", "[Nothing]"],
    "model.objective.weights": ["[1, 2]", "[1]", "[a]", "[-1, 1]"],
    "model.objective.divergence": ["JensenShannon", "AlphaDivergence", "ForwardKL", "Nothing", "{}"],
    "model.quantization": ["nf4", "null", "int3", "{load_in_8bit: true}", "{}", "{load_in_4bit: maybe}", "8"],
    "model.lora.r": NUMBERS,
    "model.lora.lora_alpha": NUMBERS,
    "model.lora.lora_dropout": NUMBERS,
    "model.lora.target_modules": ["all-linear", "[q_proj]", "[nothing]", "[]", "null", "q_proj"],
    "model.lora.bias": ["none", "all", "lora_only", "some"],
    "model.lora.use_dora": SWITCHES,
    "model.lora.use_rslora": SWITCHES,
    "model.lora.init_lora_weights": ["true", "gaussian", "pissa", "olora", "loftq", "eva", "false"],
    "model.lora.modules_to_save": ["[lm_head]", "[nothing]", "null"],
    "model.adapter": ["nowhere", "null", "org/none", "."],
    "model.optimizer": [
        "torch.optim.SGD",
        "Adagrad",
        "AdamW",
        "Nothing",
        "torch.optim.LBFGS",
        "SparseAdam",
    ],
    "model.optimizer.lr": NUMBERS,
    "model.lr_scheduler": [
        "linear",
        "cosine",
        "constant",
        "polynomial",
        "inverse_sqrt",
        "nothing",
        "reduce_lr_on_plateau",
    ],
    "model.warmup": NUMBERS,
    "model.reference": ["auto", "cached", "live", "none", "MovingReference", "AnotherModel", "nothing"],
    "model.gradient_checkpointing": SWITCHES,
    "model.on_nonfinite": ["stop", "skip", "go"],
    "model.token_metrics": SWITCHES,
    "model.layout": ["flat", "padded", "auto", "wide"],
    "model.gguf_file": ["a.gguf", "null", ""],
    "model.revision": ["main", "null", ""],
    "data.source": [
        "nowhere.jsonl",
        "",
        "org/none",
        "empty.jsonl",
        "broken.jsonl",
        "[pairs.jsonl]",
        "null",
        ".",
        "{}",
    ],
    "data.split": ["train", "test", "nothing", ""],
    "data.subset": ["a", ""],
    "data.val_source": ["pairs.jsonl", "nowhere.jsonl", "null"],
    "data.val_split": ["train", "nothing"],
    "data.val_size": NUMBERS,
    "data.columns": ["{prompt: chosen}", "{}", "{prompt: nothing}", "{nothing: prompt}", "[]"],
    "data.ignore": ["[prompt]", "[nothing]", "[]", "prompt"],
    "data.system": ["Hello", "", "null"],
    "data.multi_turn": ["drop", "answers", "keep"],
    "data.chat_template": [
        "{{ x",
        "nowhere.jinja",
        "",
        "{{ raise_exception('no') }}",
        "{% for m in messages %}{% endfor %}",
    ],
    "data.chat_template_kwargs": ["{a: 1}", "{}", "[]"],
    "data.pretemplated": SWITCHES,
    "data.keep_thinking": SWITCHES,
    "data.date": ["2026-01-31", "yesterday", ""],
    "data.on_bad_row": ["stop", "drop", "go"],
    "data.filters.ties": ["keep", "drop", "go"],
    "data.filters.min_margin": NUMBERS,
    "data.filters.duplicates": ["keep", "drop", "go"],
    "data.filters.near_duplicates": NUMBERS,
    "data.filters.leaks": ["keep", "drop", "go"],
    "data.max_length": NUMBERS,
    "data.max_prompt_length": NUMBERS,
    "data.max_response_length": NUMBERS,
    "data.overlong": ["truncate", "drop", "go"],
    "data.max_responses": NUMBERS,
    "data.batch_size": NUMBERS,
    "data.eval_batch_size": NUMBERS,
    "data.streaming": SWITCHES,
    "data.shuffle_buffer": NUMBERS,
    "data.num_workers": ["0", "-1", "abc", "null"],
    "data.shuffle": SWITCHES,
    "data.seed": NUMBERS,
    "data.tokenizer": ["nowhere", "null", ""],
    "trainer.precision": ["32-true", "bf16-mixed", "16-mixed", "bf16-true", "64-true", "8", "null"],
    "trainer.strategy": STRATEGIES,
    "trainer.devices": ["1", "0", "-1", "abc", "auto", "[0]", "null"],
    "trainer.accelerator": ["cpu", "gpu", "tpu", "mps", "auto", "abacus"],
    "trainer.max_epochs": ["0", "1", "2", "abc", "1.5"],
    "trainer.max_steps": ["0", "1", "3", "-2", "abc"],
    "trainer.max_time": ["00:00:00:00", "00:00:01:00", "soon", "1"],
    "trainer.limit_train_batches": NUMBERS,
    "trainer.limit_val_batches": NUMBERS,
    "trainer.val_check_interval": NUMBERS,
    "trainer.check_val_every_n_epoch": NUMBERS,
    "trainer.accumulate_grad_batches": NUMBERS,
    "trainer.gradient_clip_val": NUMBERS,
    "trainer.gradient_clip_algorithm": ["norm", "value", "cut"],
    "trainer.overfit_batches": ["0", "1", "2", "0.5", "-1", "abc"],
    "trainer.fast_dev_run": ["true", "false", "2", "-1"],
    "trainer.num_sanity_val_steps": ["-1", "0", "1", "-5", "abc"],
    "trainer.log_every_n_steps": NUMBERS,
    "trainer.detect_anomaly": SWITCHES,
    "trainer.deterministic": ["true", "false", "warn", "maybe"],
    "trainer.barebones": SWITCHES,
    "trainer.enable_checkpointing": SWITCHES,
    "trainer.enable_model_summary": SWITCHES,
    "trainer.inference_mode": SWITCHES,
    "trainer.logger": ["true", "false", "CSVLogger", "Nothing", "[]", "lightning.pytorch.loggers.CSVLogger"],
    "trainer.callbacks": ["EarlyStopping", "[]", "Nothing", "LearningRateMonitor", "RichProgressBar"],
    "trainer.profiler": ["simple", "advanced", "pytorch", "nothing", "null"],
    "trainer.use_distributed_sampler": SWITCHES,
    "trainer.reload_dataloaders_every_n_epochs": NUMBERS,
    "trainer.sync_batchnorm": SWITCHES,
    "trainer.plugins": ["[]", "nothing", "null"],
    "trainer.default_root_dir": [".", "pairs.jsonl", ""],
    "trainer.min_epochs": ["0", "1", "abc"],
    "trainer.benchmark": SWITCHES,
    "guard.max_drop": NUMBERS,
    "guard.max_kl": NUMBERS,
    "guard.action": ["warn", "stop", "go"],
    "last.every_n_steps": NUMBERS,
    "last.every_minutes": NUMBERS,
    "best.monitor": ["val/loss", "nothing", "null", ""],
    "best.mode": ["min", "max", "mid"],
    "best.save_top_k": ["1", "0", "-1", "-2", "abc"],
    "best.filename": ["a", "{step}", "../x", "", "null"],
    "export.dirname": ["adapter", "", "a/b"],
    "samples.num_prompts": ["0", "1", "-1", "abc"],
    "samples.max_new_tokens": ["0", "1", "-1", "abc"],
    "seed_everything": ["0", "-1", "true", "false", "abc", "99999999999999999999"],
    "run_name": ["a", "", "a/b", "..", "null"],
    "ckpt_path": ["nowhere.ckpt", "last", "best", "auto", "hpc", "registry", "pairs.jsonl", ".", ""],
    "nothing": ["1"],
    "model.nothing": ["1"],
    "data.nothing": ["1"],
}
KEPT = {"model.quantization": "null", "trainer.accelerator": "cpu", "trainer.precision": "32-true"}


def case(random_state: random.Random, base: str) -> list[str]:
    """The arguments of a random run."""
    keys = random_state.sample(list(OPTIONS), random_state.randint(1, 3))
    # A class comes before its arguments.
    chosen = {key: random_state.choice(OPTIONS[key]) for key in sorted(keys, key=lambda key: key.count("."))}
    default = {
        "model.base": base,
        **KEPT,
        "data.source": "pairs.jsonl",
        "data.val_size": "2",
        "data.batch_size": "2",
        "data.max_length": "64",
        "trainer.max_epochs": "1",
        "trainer.limit_train_batches": "2",
        "trainer.enable_progress_bar": "false",
        "samples.num_prompts": "0",
        "model.compile": "false",
    }
    arguments = ["fit"]
    if random_state.random() < 0.3:  # some of them in a file
        in_file = {key: chosen.pop(key) for key in list(chosen)[: len(chosen) // 2]}
        nested: dict[str, Any] = {}
        for key, value in in_file.items():
            place = nested
            *folders, name = key.split(".")
            for folder in folders:
                place = place.setdefault(folder, {}) if isinstance(place.get(folder, {}), dict) else {}
            with contextlib.suppress(yaml.YAMLError):
                place[name] = yaml.safe_load(value)
        Path("case.yaml").write_text(yaml.safe_dump(nested), encoding="utf-8")
        default = {key: value for key, value in default.items() if key not in in_file}
        arguments += ["--config", "case.yaml"]
    for key, value in {**default, **chosen}.items():
        arguments += [f"--{key}", value] if random_state.random() < 0.5 else [f"--{key}={value}"]
    return arguments


def outcome(arguments: list[str]) -> str:
    """``ran``, ``refused`` with one line, or the traceback of a failure."""
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            run(arguments)
    except SystemExit as end:
        if end.code in (0, 2):
            return "ran" if end.code == 0 else "refused"
        return f"exit status {end.code}\n{printed.getvalue()[-2000:]}"
    except Exception as error:
        return "refused" if line_for(error) else traceback.format_exc()
    return "ran"


def fuzz(cases: int, seed: int, base: str) -> tuple[Counter[str], list[tuple[list[str], str]]]:
    """Runs cases in the working folder. Returns how many ended in which way, and the failures."""
    random_state = random.Random(seed)  # noqa: S311
    counts: Counter[str] = Counter()
    failures = []
    for _ in range(cases):
        arguments = case(random_state, base)
        found = outcome(arguments)
        counts[found if found in ("ran", "refused") else "failed"] += 1
        if found not in ("ran", "refused"):
            failures.append((arguments, found))
            print(" ".join(arguments), found, sep="\n", end="\n\n", flush=True)
        if torch.distributed.is_initialized():  # by a case whose strategy is ddp
            torch.distributed.destroy_process_group()
        for folder in ("runs", "lightning_logs"):
            shutil.rmtree(folder, ignore_errors=True)
    return counts, failures


def prepare(folder: Path) -> None:
    """Writes the files that cases name."""
    from tests.tiny import made_up_rows, write_jsonl

    write_jsonl(folder / "pairs.jsonl", made_up_rows(12))
    (folder / "empty.jsonl").write_text("")
    (folder / "broken.jsonl").write_text('{"prompt": "a", "chosen": ')


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    from tests.tiny import save_tiny_base

    os.environ["HF_HUB_OFFLINE"] = "1"
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["LIT_DPO_CACHE"] = f"{name}/cache"
        base = save_tiny_base(folder / "llama-tiny")
        prepare(folder)
        os.chdir(folder)
        counts, _ = fuzz(options.cases, options.seed, base)
        os.chdir("/")
    print(f"{options.cases} cases: {counts['ran']} ran, {counts['refused']} refused, {counts['failed']} failed")


if __name__ == "__main__":
    main()
