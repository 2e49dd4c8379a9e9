"""Networks that no library offers, and the door to those of the libraries."""

from kdrun.models.build import ROLE_KEYS, build_model

__all__ = ["ROLE_KEYS", "build_model"]
