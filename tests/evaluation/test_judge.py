"""``judge``: verdicts of four kinds of judges, win rates, and what happens when one fails in the middle."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification, LlamaConfig

from lit_dpo.cli.app import main
from lit_dpo.evaluation.judges import Case, Endpoint, LanguageModel, RewardModel
from lit_dpo.evaluation.statistics import Resampling
from lit_dpo.evaluation.winrate import Verdict, at_equal_length, win_rate
from lit_dpo.files.store import Store
from tests.conftest import CHECKPOINT
from tests.evaluation.fake_endpoint import fake_endpoint
from tests.tiny import SIZES, tiny_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore:.*")
CASE = Case("the cat?", [1], "on the mat and then it ran", "ran", [2], [3])
TWIN = CASE._replace(first=CASE.second, second=CASE.first)


def judged(trained: Path, folder: Path, *arguments: str) -> dict[str, object]:
    """The content of judge.json."""
    short = ["--sampling.max_new_tokens", "6", "--progress_bar", "false", "--output", str(folder)]
    main(["judge", "--ckpt_path", str(trained / CHECKPOINT), "--held_out", "4", *short, *arguments])
    return dict(json.loads((folder / "judge.json").read_text()))


def test_implicit_rewards_and_what_is_kept(
    trained: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    first = judged(trained, tmp_path / "judge")
    assert first["num_prompts"] == 4
    assert sum(first[name] for name in ("wins", "ties", "losses")) == 4  # type: ignore[misc]
    assert "This judge is A itself" in capsys.readouterr().out
    rows = [json.loads(line) for line in (tmp_path / "judge/judgements.jsonl").read_text().splitlines()]
    assert {row["score"] for row in rows} <= {0.0, 0.5, 1.0}
    monkeypatch.setattr("lit_dpo.evaluation.judging.answers", None)  # nothing is answered again
    assert judged(trained, tmp_path / "judge") == first


def test_two_checkpoints(trained: Path, tmp_path: Path) -> None:
    found = judged(trained, tmp_path, "--against", str(trained / "version_0/adapter"))
    assert found["ties"] == 4, "the adapter is the checkpoint's, so all answers are equal"
    assert found["consistency"] is None


@pytest.mark.ci
@pytest.mark.slow
def test_an_endpoint(
    trained: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "very-secret")
    with fake_endpoint(429, 500, "I cannot say.") as server:
        options = ["--by", "endpoint", "--judge_model", "gpt", "--url", server.url]
        monkeypatch.setattr("lit_dpo.evaluation.judges.LONGEST_WAIT", 0.01)
        found = judged(trained, tmp_path / "judge", *options)
        assert server.keys == {"Bearer very-secret"}
        asked = server.asked
        again = judged(trained, tmp_path / "judge", *options)
        assert server.asked == asked + 2, "verdicts are kept, and the one that could not be read is asked for again"
    assert (found["unreadable"], again["unreadable"]) == (1, 0)
    assert found["consistency"] == 1.0
    assert "cases without a verdict: ties" in capsys.readouterr().out
    assert all(b"very-secret" not in path.read_bytes() for path in (tmp_path / "judge").iterdir())


def test_an_endpoint_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    with fake_endpoint(401) as server, pytest.raises(OSError, match=r"refuses: status 401\. Are OPENAI_API_KEY and"):
        Endpoint(server.url, "gpt")([CASE])
    with (
        fake_endpoint(*[503] * 6) as server,
        pytest.raises(OSError, match=r"status 503, after 6 attempts\. Is the address right"),
    ):
        Endpoint(server.url, "gpt", wait=0.01)([CASE])
    with fake_endpoint("Hm.", "Hm.", "[[A]]") as server:
        assert Endpoint(server.url, "gpt")([CASE, CASE])[0].readable is False
    with fake_endpoint(*["Hm."] * 6) as server, pytest.raises(ValueError, match="gave no verdict 5 times in a row"):
        Endpoint(server.url, "gpt")([CASE] * 3)
    with fake_endpoint() as server:
        assert Endpoint(server.url, "gpt")([CASE, TWIN]) == [Verdict((1.0, 1.0)), Verdict((0.0, 0.0))]
    monkeypatch.setattr("lit_dpo.evaluation.judges.RETRIES", 1)
    with pytest.raises(OSError, match=r"--url http://127.0.0.1:9/v1/chat/completions: .*, after 1 attempts"):
        Endpoint("http://127.0.0.1:9/v1", "gpt")([CASE])
    with pytest.raises(ValueError, match="is no address of an endpoint"):
        Endpoint("file:///etc/passwd", "gpt")


def test_a_language_model_and_a_reward_model(tiny_base: str, tmp_path: Path) -> None:
    (verdict,) = LanguageModel(tiny_base)([CASE])
    (turned,) = LanguageModel(tiny_base)([TWIN])
    assert turned.preferences == pytest.approx([1 - one for one in reversed(verdict.preferences)], abs=1e-6)  # type: ignore[operator]
    torch.manual_seed(0)
    config = LlamaConfig(**SIZES, vocab_size=len(tiny_tokenizer()), num_labels=1, pad_token_id=0, initializer_range=0.5)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path / "reward")
    tiny_tokenizer().save_pretrained(tmp_path / "reward")
    judge = RewardModel(str(tmp_path / "reward"))
    (one,), (other,) = (judge([case])[0].preferences for case in (CASE, TWIN))
    assert one + other == pytest.approx(1.0)  # type: ignore[operator]
    assert one != 0.5
    with pytest.raises(ValueError, match="has 2 outputs; a reward model has one"):
        RewardModel(tiny_base)


def test_wrong_arguments(trained: Path, tmp_path: Path) -> None:
    for arguments, message in {
        ("--by", "endpoint"): "--judge_model names the judge of",
        ("--judge_model", "x"): "--judge_model names the judge of",
        (
            "--by",
            "reward_model",
            "--judge_model",
            "./none",
        ): "--judge_model ./none cannot be loaded: there is no such folder",
        ("--against", "nowhere"): "--against nowhere: there is no such folder",
        ("--held_out", "0"): "Give prompts: --prompt TEXT",
        ("--held_out", "0", "--prompt", "x", "--source", "y"): "give their --held_out NUMBER too",
        ("--url", "http://x"): "--url is the address of --by endpoint",
        ("--against", "a/nowhere.ckpt"): "--against a/nowhere.ckpt: there is no such file",
    }.items():
        with pytest.raises((ValueError, OSError), match=message):
            judged(trained, tmp_path, *arguments)


def test_verdicts() -> None:
    assert [Verdict(given).score for given in ((0.9,), (0.4,), (0.5,), (0.9, 0.6), (0.9, 0.2), (None, 1.0))] == [
        *(1.0, 0.0, 0.5, 1.0, 0.5, 0.5)
    ]
    assert not Verdict((0.9, 0.2)).consistent
    assert not Verdict((None, 1.0)).readable


def test_length_is_controlled() -> None:
    generator = np.random.default_rng(0)
    difference = generator.normal(1.0, 1.0, 4000)  # the first answers are longer
    chance = 1 / (1 + np.exp(-(0.5 + 1.5 * difference)))
    scores = (generator.random(4000) < chance).astype(float)
    assert at_equal_length(scores, difference) == pytest.approx(1 / (1 + np.exp(-0.5)), abs=0.03)
    verdicts = [Verdict((score,)) for score in (generator.random(300) < 1 / (1 + np.exp(-3 * difference[:300])))]
    lengths = np.stack([100 + 40 * difference[:300], np.full(300, 100.0)], axis=1)
    found = win_rate(verdicts, lengths, Resampling(num_resamples=400))
    assert found.rate.low > 0.6
    assert found.controlled.low < 0.5 < found.controlled.high + 0.1, "length explains the wins"
    alike = win_rate([Verdict((1.0,))] * 5, lengths[:5], Resampling())
    assert alike.rate.low < 0.6
    assert np.isnan(alike.controlled.value)


def test_a_store_that_was_cut(tmp_path: Path) -> None:
    store = Store(tmp_path / "a.jsonl")
    store["one"] = [1]
    store["two"] = [2]
    content = (tmp_path / "a.jsonl").read_bytes()
    (tmp_path / "a.jsonl").write_bytes(content[:-4])
    again = Store(tmp_path / "a.jsonl")
    assert "one" in again
    assert "two" not in again
    again["two"] = [3]
    assert Store(tmp_path / "a.jsonl")["two"] == [3]
    (tmp_path / "a.jsonl").write_text("x\n")
    with pytest.raises(ValueError, match=r"a\.jsonl, line 1 was not written by this program"):
        Store(tmp_path / "a.jsonl")
