"""Processes of a run: rendezvous, collectives, heartbeat, synchronised batch norm."""
