"""Policy: a PEFT model that gives the log-probs of a ``PairBatch``, as it is or as it was at the start."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, TypeAlias

import torch
from lightning.fabric.utilities import rank_zero_warn
from peft import PeftModel
from torch import nn

from lit_dpo.data.batch import PairBatch
from lit_dpo.data.tokenization import TokenizedPair
from lit_dpo.objectives import PairLogps
from lit_dpo.policy.attention import NAME, AttentionLayout, UnsupportedAttentionError
from lit_dpo.policy.execution import Recomputation, Switch, compile_layers
from lit_dpo.policy.loading import REFERENCE_ADAPTER
from lit_dpo.policy.logprobs import TokenLogps, gather_logps, token_logps

Layout: TypeAlias = Literal["auto", "flat", "padded"]


class Policy(nn.Module):
    """A language model with adapters.

    Args:
        model: The PEFT model.
        layout: ``flat``, each prompt once and no padding; ``padded``, separate rows through the model's own forward;
            ``auto``, flat if a few tokens give the same log-probs both ways, else padded with a warning.
        statistics: Whether ``logps`` tells entropy and the like of each response token.
        recompute: Whether layers recompute their activations in the backward pass; ``auto``, where memory is short.

    Raises:
        ValueError: If ``layout`` is ``flat`` and the architecture cannot be served so.
    """

    def __init__(
        self, model: PeftModel, layout: Layout = "auto", recompute: Switch = "auto", statistics: bool = False
    ) -> None:
        super().__init__()
        self.model, self.statistics = model, statistics
        self.recomputation = Recomputation(model, recompute)
        self.compiled = False
        self.flat = layout != "padded"
        if not self.flat:
            return
        with model.disable_adapter():  # whose dropout would make two passes differ
            reason = self._flat_fails()
        if reason and layout == "flat":
            raise ValueError(f"model.layout=flat cannot serve this architecture: {reason}. Use model.layout=padded.")
        if reason:
            rank_zero_warn(f"The padded layout is used, slower and larger, because {reason}.", stacklevel=2)
            self.flat = False

    def logps(self, batch: PairBatch) -> PairLogps:
        """Summed log-probs of the responses of P pairs, in nats."""
        return batch.sum_responses(*self.token_logps(batch, self.statistics))

    def token_logps(self, batch: PairBatch, statistics: bool = False) -> TokenLogps:
        """Log-prob of each response token, (R,), in nats, and, if asked for, statistics of its distribution."""
        if torch.is_grad_enabled():
            device = batch.input_ids.device
            self.recomputation.prepare(self._num_computed(batch), device, lambda: self._probe(device))
        return self._flat_logps(batch, statistics) if self.flat else self._padded_logps(batch, statistics)

    def compile_layers(self) -> None:
        """Fuses the elementwise work of the layers; costs half a minute at the first batches."""
        compile_layers(self.model)
        self.compiled = True

    @contextmanager
    def initial(self) -> Iterator[None]:
        """Within it the model is the initial policy: adapters off, or the frozen copy of those it started from."""
        with self.frozen(REFERENCE_ADAPTER if REFERENCE_ADAPTER in self.model.peft_config else None):
            yield

    @contextmanager
    def frozen(self, adapter: str | None) -> Iterator[None]:
        """Within it the model has other adapters, or none.

        Nothing computed in it may be differentiated after it: so it is without gradients.
        """
        with torch.no_grad():
            if adapter is None:
                with self.model.disable_adapter():
                    yield
                return
            self.model.set_adapter(adapter, inference_mode=True)
            try:
                yield
            finally:
                self.model.set_adapter("default")

    def _flat_logps(self, batch: PairBatch, statistics: bool = False) -> TokenLogps:
        """Log-probs from the flat row."""
        causal_lm: Any = self.model.get_base_model()
        hidden = causal_lm.base_model(
            input_ids=batch.input_ids[None],
            position_ids=batch.position_ids[None],
            # A mask of four dimensions is handed on as it is; ours is unused, and spares transformers building one.
            attention_mask=torch.zeros(1, 1, 1, 1, device=batch.input_ids.device),
            use_cache=False,
            layout=AttentionLayout(batch.segments, batch.input_ids.device),
        ).last_hidden_state[0]
        return token_logps(hidden[batch.predictors], batch.targets, causal_lm.get_output_embeddings(), statistics)

    def _padded_logps(self, batch: PairBatch, statistics: bool = False) -> TokenLogps:
        """Log-probs from separate rows and the model's own logits."""
        rows = batch.padded()
        logits = self.model(input_ids=rows.input_ids, attention_mask=rows.attention_mask, use_cache=False).logits
        return gather_logps(logits[:, :-1][rows.response_mask[:, 1:]], batch.targets, statistics)

    def _num_computed(self, batch: PairBatch) -> int:
        """Tokens that a forward computes."""
        return batch.input_ids.numel() if self.flat else batch.padded().input_ids.numel()

    def _probe(self, device: torch.device) -> int:
        """Computes a small batch, and tells of how many tokens; of so many that the adapters hardly count."""
        batch = self._small_batch(device, copies=10)
        (self._flat_logps if self.flat else self._padded_logps)(batch)
        return self._num_computed(batch)

    def _small_batch(self, device: torch.device, copies: int = 1) -> PairBatch:
        """Two made-up pairs, of 20 and 31 tokens, perhaps several times."""
        vocabulary = self.model.get_input_embeddings().weight.shape[0]
        ids = torch.arange(40, 91).remainder(vocabulary).tolist()
        pairs = [TokenizedPair(ids[:7], ids[7:16], ids[16:20]), TokenizedPair(ids[20:21], ids[21:22], ids[22:51])]
        return PairBatch.from_pairs(pairs * copies).to(device)

    @torch.no_grad()
    def _flat_fails(self) -> str | None:
        """Switches to attention over the flat row, if that gives the model's own log-probs; else returns why not."""
        causal_lm: Any = self.model.get_base_model()
        own_attention = causal_lm.config._attn_implementation
        embeddings = causal_lm.get_input_embeddings().weight
        batch = self._small_batch(embeddings.device)
        padded = self._padded_logps(batch).logps
        try:
            causal_lm.set_attn_implementation(NAME)
            flat = self._flat_logps(batch).logps
            # Scaling or soft-capping after the head would escape log-probs that are computed from the head alone.
            row = batch.input_ids[None, :20]
            own = causal_lm(input_ids=row, use_cache=False).logits
            head = causal_lm.get_output_embeddings()(causal_lm.base_model(row, use_cache=False).last_hidden_state)
        except torch.OutOfMemoryError:
            raise
        except (UnsupportedAttentionError, TypeError, AttributeError, RuntimeError, ValueError) as error:
            reason = f"{type(error).__name__}: {str(error).splitlines()[0]:.120}"
        else:
            difference = (flat - padded).abs().max().item()
            if not torch.allclose(head.float(), own.float(), rtol=1e-2, atol=1e-2):
                reason = "its logits are not the output of its head alone (scaling or soft-capping)"
            elif difference < (1e-3 if embeddings.dtype == torch.float32 else 0.25):
                return None
            else:
                reason = f"its log-probs differ from the model's own by {difference:.2g} nats"
        causal_lm.set_attn_implementation(own_attention)
        return reason
