"""``python -m lit_dpo judge``: how often the aligned model's answers win, by a judge."""

from collections.abc import Callable
from pathlib import Path
from typing import Literal

from lit_dpo.evaluation.judges import Endpoint, ImplicitReward, Judge, LanguageModel, RewardModel
from lit_dpo.evaluation.judging import Contestant, Sampling, judged_text, run_judging
from lit_dpo.evaluation.prompts import collect_prompts
from lit_dpo.evaluation.statistics import Resampling
from lit_dpo.evaluation.trained import TrainedQuantization, find_checkpoint, find_trained
from lit_dpo.files.console import say
from lit_dpo.module import DPOModule

OPENAI = "https://api.openai.com/v1"


def judge(
    ckpt_path: str | None = None,
    adapter: str | None = None,
    against: str | None = None,
    prompt: list[str] | str | None = None,
    prompts: str | None = None,
    held_out: int = 0,
    source: str | None = None,
    by: Literal["implicit", "reward_model", "language_model", "endpoint"] = "implicit",
    judge_model: str | None = None,
    url: str = OPENAI,
    output: str = "judge",
    sampling: Sampling = Sampling(),  # noqa: B008  it is frozen
    intervals: Resampling = Resampling(),  # noqa: B008
    base: str | None = None,
    quantization: TrainedQuantization = "auto",
    trust_remote_code: bool = False,
    progress_bar: bool = True,
) -> None:
    """Lets two models answer prompts and a judge compare the answers. Goes on where an interrupted run was.

    Args:
        ckpt_path: Checkpoint of the model whose win rate is computed.
        adapter: Folder or hub id of an exported adapter, instead of a checkpoint.
        against: Checkpoint or adapter of the other model; by default the model before training.
        prompt: A prompt, or a list of prompts.
        prompts: File of prompts: one per line, or .jsonl with a ``prompt`` in each line.
        held_out: Number of held-out prompts, from the checkpoint's data or from ``source``.
        source: Data with the held-out prompts, in any form that data.source takes.
        by: The judge: the ``implicit`` reward of the first model; a ``reward_model``; a ``language_model``; or a model
            behind an OpenAI-compatible ``endpoint``, whose key is read from OPENAI_API_KEY.
        judge_model: The reward model or language model by hub id or folder, or the name of the endpoint's model.
        url: Address of the endpoint.
        output: Folder for answers, verdicts and the result. A later run takes from it what is there.
        sampling: How answers are written.
        intervals: How intervals are computed.
        base: Base of ``adapter``, if it is not where its configuration says.
        quantization: Quantization of the base of ``adapter`` in training; ``auto`` is as its run or its export tells.
        trust_remote_code: Whether to run model code that comes with a repository.
        progress_bar: Whether to show progress bars.
    """
    if url != OPENAI and by != "endpoint":
        raise ValueError("--url is the address of --by endpoint.")
    if (judge_model is None) != (by == "implicit"):
        raise ValueError("--judge_model names the judge of --by reward_model, language_model and endpoint alone.")
    trained = find_trained(
        ckpt_path, adapter, base=base, quantization=quantization, trust_remote_code=trust_remote_code
    )
    other = trained
    if against is not None:
        if against.endswith(".ckpt") or Path(against).is_file():
            other = find_checkpoint(Path(against), trust_remote_code=trust_remote_code, option="--against")
        else:
            other = find_trained(None, against, trust_remote_code=trust_remote_code, option="--against")
    wanted = (prompt, prompts, held_out, source)
    questions = collect_prompts(trained, *wanted)
    theirs = questions
    if other.tokenizer.get_vocab() != trained.tokenizer.get_vocab():
        if held_out:
            raise ValueError("--held_out prompts are in tokens of the first model. For two bases, give --prompts.")
        theirs = collect_prompts(other, *wanted)

    def open_judge(load: Callable[[], DPOModule]) -> Judge:
        if by == "implicit":
            return ImplicitReward(load(), trained.digest)
        assert judge_model is not None
        if by == "endpoint":
            return Endpoint(url, judge_model)
        return (RewardModel if by == "reward_model" else LanguageModel)(judge_model, trust_remote_code)

    judged = run_judging(
        Contestant(trained, False, questions),
        Contestant(other, against is None, theirs),
        open_judge,
        Path(output),
        sampling=sampling,
        resampling=intervals,
        progress_bar=progress_bar,
    )
    say(judged_text(judged, intervals.level))
    say(f"\nEach case: {Path(output) / 'judgements.jsonl'}")
