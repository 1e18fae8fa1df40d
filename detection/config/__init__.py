"""Run configuration and the command line that makes one."""
