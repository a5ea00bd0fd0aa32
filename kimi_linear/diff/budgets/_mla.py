"""Budgets of the mla ops."""

__all__ = []
