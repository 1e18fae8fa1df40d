"""Processes of a run: rendezvous, collectives, heartbeat, synchronized batch norm."""
