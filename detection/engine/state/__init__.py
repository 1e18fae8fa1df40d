"""The state of a run: what a checkpoint holds, where it lies, and how a run goes on from it."""
