"""Budgets of the kda ops."""

__all__ = []
