"""The setting ``model.reference`` ──► a ``Reference``."""

from collections.abc import Callable
from typing import Any, Literal, TypeAlias

import torch
from transformers import PreTrainedTokenizerBase

from lit_dpo.objectives import Objective
from lit_dpo.policy.policy import Policy
from lit_dpo.reference.another import AnotherModel
from lit_dpo.reference.base import NoReference, Reference
from lit_dpo.reference.cache import CachedReference
from lit_dpo.reference.initial import InitialPolicy
from lit_dpo.reference.moving import MovingReference

ReferenceChoice: TypeAlias = Literal["auto", "cached", "live", "none"] | AnotherModel | MovingReference


def check_choice(choice: ReferenceChoice, objective: Objective, moves: bool = True) -> None:
    """Refuses ``none`` for an objective that needs a reference, and a moving copy of all weights.

    Args:
        choice: The setting ``model.reference``.
        objective: The objective.
        moves: Whether a copy that follows the policy can be made: one of adapters.

    Raises:
        ValueError: If the objective needs a reference. The message names objectives that need none. Or if there are no
            adapters that a moving copy could be made of.
    """
    if isinstance(choice, MovingReference) and not moves:
        raise ValueError("model.reference=MovingReference follows adapters. With model.lora=null, use cached or live.")
    if choice == "none" and objective.uses_reference:
        raise ValueError(
            f"model.reference=none: {type(objective).__name__} needs a reference. Objectives without one are SimPO, "
            "ORPO, CPO and SFT."
        )


def open_reference(
    choice: ReferenceChoice,
    policy: Policy,
    objective: Objective,
    dtype: torch.dtype,
    tokenizer: Callable[[], PreTrainedTokenizerBase],
    data: Any = None,
) -> Reference:
    """Builds the chosen reference.

    Args:
        choice: The setting ``model.reference``.
        policy: The policy in training.
        objective: The objective; ``auto`` builds no reference if it uses none.
        dtype: Type of the matrix products.
        tokenizer: Function that returns the policy's tokenizer, to compare vocabularies.
        data: The data module, if there is one. ``auto`` is ``live`` for a stream, whose pairs come once.
    """
    if choice == "none" or (choice == "auto" and not objective.uses_reference):
        return NoReference()
    if isinstance(choice, MovingReference):
        choice.policy = policy
        return choice
    if isinstance(choice, AnotherModel):
        other = choice.open(tokenizer(), dtype, policy.model.device)
        return CachedReference.in_cache(other, dtype) if choice.cached else other
    initial = InitialPolicy(policy)
    is_live = choice == "live" or (choice == "auto" and getattr(data, "streaming", False))
    return initial if is_live else CachedReference.in_cache(initial, dtype)
