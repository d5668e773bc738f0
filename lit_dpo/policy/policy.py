"""Policy: a PEFT model that computes the log-probs of a ``PairBatch``, with its trained adapter or with another."""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, Literal, TypeAlias

import torch
from lightning.fabric.utilities import rank_zero_warn
from peft import PeftModel
from torch import nn

from lit_dpo.data.batch import PairBatch
from lit_dpo.data.tokenization import TokenizedPair
from lit_dpo.objectives import PairLogps
from lit_dpo.policy.adapters import REFERENCE_ADAPTER, TRAINED_ADAPTER
from lit_dpo.policy.attention import NAME, AttentionLayout, UnsupportedAttentionError
from lit_dpo.policy.execution import Recomputation, Switch, compile_layers
from lit_dpo.policy.full import FullModel
from lit_dpo.policy.logprobs import TokenLogps, gather_logps, token_logps
from lit_dpo.policy.precision import float16_autocast
from lit_dpo.policy.sharding import is_sharded, num_parameters

Layout: TypeAlias = Literal["auto", "flat", "padded"]


class Policy(nn.Module):
    """A language model with adapters, or one of which all weights train.

    Args:
        model: The PEFT model, or a ``FullModel``.
        layout: ``flat`` computes each prompt once, without padding. ``padded`` computes each response in a row of its
            own, through the model's own forward. ``auto`` is ``flat`` if both give the same log-probs on a few tokens,
            else ``padded``, with a warning.
        recompute: Whether layers recompute their activations in the backward pass. ``auto`` does if memory is short.
        statistics: Whether ``logps`` also computes the entropy and other statistics of each response token.

    Raises:
        ValueError: If ``layout`` is ``flat`` and the architecture does not support it.
    """

    def __init__(
        self,
        model: PeftModel | FullModel,
        layout: Layout = "auto",
        recompute: Switch = "auto",
        statistics: bool = False,
    ) -> None:
        super().__init__()
        self.model: Any = model
        self.statistics = statistics
        self.recomputation = Recomputation(model, recompute)
        self.compiled, self.sharded = False, is_sharded(model)
        self.flat = layout != "padded"
        if not self.flat:
            return
        adapters_off = nullcontext() if isinstance(model, FullModel) else model.disable_adapter()
        with adapters_off, float16_autocast(model):  # the adapters' dropout would make two passes differ
            reason = self._why_not_flat()
        if reason and layout == "flat":
            raise ValueError(f"model.layout=flat does not work for this model: {reason}. Use model.layout=padded.")
        if reason:
            rank_zero_warn(
                f"The padded layout is used, which takes more time and memory, because {reason}.", stacklevel=2
            )
            self.flat = False

    def summary(self) -> str:
        """The numbers of parameters and the layout, in one line."""
        trainable, total = num_parameters(self.model)
        layout = "flat" if self.flat else "padded"
        return f"{trainable / 1e6:.1f} M of {total / 1e6:.1f} M parameters train, {layout} layout"

    def logps(self, batch: PairBatch) -> PairLogps:
        """Summed log-probs of the responses of P pairs, in nats."""
        return batch.sum_responses(*self.token_logps(batch, self.statistics))

    def token_logps(self, batch: PairBatch, statistics: bool = False) -> TokenLogps:
        """Log-prob of each response token, (R,), in nats, with statistics of the distributions if requested."""
        if torch.is_grad_enabled():
            device = batch.input_ids.device
            self.recomputation.prepare(self._num_computed(batch), device, lambda: self._probe(device))
        return self._flat_logps(batch, statistics) if self.flat else self._padded_logps(batch, statistics)

    def keep_in_step(self, num_batches: int) -> None:
        """Takes part in gathering the weights of ``num_batches`` batches that only other processes compute."""
        with torch.no_grad():
            for _ in range(num_batches if self.sharded else 0):
                self.token_logps(self._small_batch(self.model.device))

    def compile_layers(self) -> None:
        """Compiles the layers, which fuses elementwise operations. This takes half a minute at the first batches."""
        compile_layers(self.model)
        self.compiled = True

    @contextmanager
    def initial(self) -> Iterator[None]:
        """Within this context the model is the initial policy.

        That is: adapters off, or a frozen copy of the first adapter, or the initial weights.
        """
        with self.frozen(REFERENCE_ADAPTER if REFERENCE_ADAPTER in self.model.peft_config else None):
            yield

    def release_initial(self) -> None:
        """Frees the initial weights, if they are a copy."""
        if isinstance(self.model, FullModel):
            self.model.forget_initial()

    @contextmanager
    def frozen(self, adapter: str | None) -> Iterator[None]:
        """Within this context another adapter is active, or none, and no gradients are recorded.

        Recomputation in a backward pass outside the context would use the trained adapter and give wrong gradients.
        """
        with torch.no_grad():
            if adapter is None:
                with self.model.disable_adapter():
                    yield
                return
            # PeftModel.set_adapter takes inference_mode since peft 0.19. The tuner inside it took it earlier too.
            self.model.base_model.set_adapter(adapter, inference_mode=True)
            try:
                yield
            finally:
                self.model.set_adapter(TRAINED_ADAPTER)

    def _flat_logps(self, batch: PairBatch, statistics: bool = False) -> TokenLogps:
        """Log-probs in the flat layout."""
        causal_lm: Any = self.model.get_base_model()
        hidden = causal_lm.base_model(
            input_ids=batch.input_ids[None],
            position_ids=batch.position_ids[None],
            # transformers passes a mask of four dimensions on unchanged. Nothing reads this one; it saves building one.
            attention_mask=torch.zeros(1, 1, 1, 1, device=batch.input_ids.device),
            use_cache=False,
            layout=AttentionLayout(batch.segments, batch.input_ids.device),
        ).last_hidden_state[0]
        return token_logps(hidden[batch.predictors], batch.targets, causal_lm.get_output_embeddings(), statistics)

    def _padded_logps(self, batch: PairBatch, statistics: bool = False) -> TokenLogps:
        """Log-probs in the padded layout, from the model's own logits."""
        rows = batch.padded()
        logits = self.model(input_ids=rows.input_ids, attention_mask=rows.attention_mask, use_cache=False).logits
        return gather_logps(logits[:, :-1][rows.response_mask[:, 1:]], batch.targets, statistics)

    def _num_computed(self, batch: PairBatch) -> int:
        """Number of tokens in a forward pass, including padding."""
        return batch.input_ids.numel() if self.flat else batch.padded().input_ids.numel()

    def _probe(self, device: torch.device) -> int:
        """Runs a small batch and returns its number of tokens.

        The batch is large enough that the adapter weights hardly count in the memory per token.
        """
        batch = self._small_batch(device, copies=10)
        (self._flat_logps if self.flat else self._padded_logps)(batch)
        return self._num_computed(batch)

    def _small_batch(self, device: torch.device, copies: int = 1) -> PairBatch:
        """Two artificial pairs, of 20 and 31 tokens, repeated ``copies`` times."""
        vocabulary = self.model.get_input_embeddings().weight.shape[0]
        ids = torch.arange(40, 91).remainder(vocabulary).tolist()
        pairs = [TokenizedPair(ids[:7], ids[7:16], ids[16:20]), TokenizedPair(ids[20:21], ids[21:22], ids[22:51])]
        return PairBatch.from_pairs(pairs * copies).to(device)

    @torch.no_grad()
    def _why_not_flat(self) -> str | None:
        """Switches the model to attention over the flat row if this keeps its log-probs. Otherwise returns the reason.

        Only errors of an unsupported architecture are caught. A TypeError or an AttributeError is a mistake in the code
        and is raised.
        """
        causal_lm: Any = self.model.get_base_model()
        parameters = inspect.signature(causal_lm.base_model.forward).parameters
        if "position_ids" not in parameters:
            return f"{type(causal_lm).__name__} takes no position_ids"
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
            return f"{type(causal_lm).__name__} passes no extra keyword arguments to its attention layers"
        if causal_lm.get_output_embeddings() is None:
            return f"{type(causal_lm).__name__} has no language-model head"
        own_attention = causal_lm.config._attn_implementation
        embeddings = causal_lm.get_input_embeddings().weight
        batch = self._small_batch(embeddings.device)
        padded = self._padded_logps(batch).logps
        try:
            causal_lm.set_attn_implementation(NAME)
            flat = self._flat_logps(batch).logps
            # Scaling or soft-capping after the head would be missing from log-probs computed with the head alone.
            row = batch.input_ids[None, :20]
            own = causal_lm(input_ids=row, use_cache=False).logits
            head = causal_lm.get_output_embeddings()(causal_lm.base_model(row, use_cache=False).last_hidden_state)
        except torch.OutOfMemoryError:
            raise
        except (UnsupportedAttentionError, RuntimeError, ValueError) as error:
            reason = f"{type(error).__name__}: {str(error).splitlines()[0]:.120}"
        else:
            difference = (flat - padded).abs()
            # In half precision, rounded logits alone put a log-prob off by a few units in its last place.
            half = embeddings.dtype != torch.float32
            bound = 0.25 + 8 * torch.finfo(embeddings.dtype).eps * padded.abs() if half else torch.tensor(1e-3)
            if not torch.allclose(head.float(), own.float(), rtol=1e-2, atol=1e-2):
                reason = "its logits are not the output of its head alone (scaling or soft-capping)"
            elif bool((difference < bound).all()):
                return None
            else:
                reason = f"its log-probs differ from the model's own by {difference.max().item():.2g} nats"
        causal_lm.set_attn_implementation(own_attention)
        return reason
