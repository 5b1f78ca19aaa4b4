"""The papers' tables: which runs fill them, with which settings, and the papers' own numbers."""
