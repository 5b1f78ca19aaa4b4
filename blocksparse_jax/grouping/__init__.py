"""Grouping: filters, columns and channels brought into blocks."""
