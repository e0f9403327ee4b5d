"""Runs plans of tasks over shared memory: who does what, where, and what happens when a worker dies.

Two doors: `scheduler.task` (what a plan is) and `scheduler.run` (a pool that runs it). Knows nothing of arrays.
"""
