"""How a job meets Ray: one door, so that every job connects the same way."""
