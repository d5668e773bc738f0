"""The reference of the policy: the initial policy, another model, a moving copy of the policy, or none."""

from lit_dpo.reference.another import AnotherModel
from lit_dpo.reference.base import NoReference, Reference
from lit_dpo.reference.cache import CachedReference
from lit_dpo.reference.initial import InitialPolicy
from lit_dpo.reference.moving import MovingReference

__all__ = ["AnotherModel", "CachedReference", "InitialPolicy", "MovingReference", "NoReference", "Reference"]
