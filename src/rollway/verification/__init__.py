"""`rollway verify`: whether a results folder is what its stages wrote, and whether its parts agree."""

from rollway.verification.verify import Outcome, verify

__all__ = ["Outcome", "verify"]
