"""Budgets of the dense ops."""

__all__ = []
