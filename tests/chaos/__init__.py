"""Chaos as a tool: a seeded plan of failures against a real mesh under load, and what must hold.

``python -m tests.chaos --minutes 60 --seed 7``. The plan follows from the seed alone.
"""
