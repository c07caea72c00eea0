"""Rotary position embedding of the queries and keys of one projection, with their RMSNorm."""
